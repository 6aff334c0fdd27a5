"""Every exception honeloom raises on purpose.

    HoneloomError                     exit 1   something failed while working
    ├── InputError                    exit 2   the user can mend the call
    │   ├── ConfigError                        a recipe, flag or YAML file is wrong
    │   ├── UnknownNameError                   a name is not in a registry
    │   ├── MissingExtraError                  an optional dependency is not installed
    │   ├── SourceError                        a model or rows cannot be found or fetched
    │   │   └── NotCachedError                 a hub artefact that a plan may not download
    │   ├── RowsError                          too many rows are unusable, or none are left
    │   ├── CheckpointError                    a model file is damaged, hostile or unsupported
    │   ├── IncompatibleModelsError            models that cannot be combined
    │   ├── TemplateError                      a chat template is unsafe or trains no turn end
    │   └── OutputExistsError                  the output folder holds something else
    ├── HubError                      exit 1   the hub kept failing; the same command goes on
    ├── LockedError                   exit 1   another process writes the same output
    ├── MessageError                  exit 1   what a client or the server sent is not what was agreed
    ├── NotFiniteError                exit 1   a loss, gradient or tensor is NaN or infinite
    ├── OutOfMemoryError              exit 1   a device or the host has not enough memory
    ├── OutOfSpaceError               exit 1   not enough room on the disk
    └── VerificationError             exit 3   a result is not what it claims

Messages name the thing, the value met, what is allowed, and the next step.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "HoneloomError",
    "HubError",
    "IncompatibleModelsError",
    "InputError",
    "LockedError",
    "MessageError",
    "MissingExtraError",
    "NotCachedError",
    "NotFiniteError",
    "OutOfMemoryError",
    "OutOfSpaceError",
    "OutputExistsError",
    "RowsError",
    "SourceError",
    "TemplateError",
    "UnknownNameError",
    "VerificationError",
]


class HoneloomError(Exception):
    """Base of every error honeloom raises on purpose; `exit_code` is the process's answer."""

    exit_code = 1


class InputError(HoneloomError):
    """The call can be mended by the user."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe, a flag or a YAML file is wrong."""


class UnknownNameError(InputError):
    """A name is not in a registry."""


class MissingExtraError(InputError):
    """An optional dependency is not installed; the message names the extra."""


class SourceError(InputError):
    """A model or rows cannot be found or fetched."""


class NotCachedError(SourceError):
    """A hub artefact is not in the cache, and the caller may not download it."""


class RowsError(InputError):
    """Too many rows are unusable, or none are left."""


class CheckpointError(InputError):
    """A model file is damaged, hostile or of an unsupported kind."""


class IncompatibleModelsError(InputError):
    """Models that cannot be combined; the message names the field and both values."""


class TemplateError(InputError):
    """A chat template is unsafe, fails, or never makes the turn end a label."""


class OutputExistsError(InputError):
    """The output folder exists and holds something other than the same result."""


class HubError(HoneloomError):
    """The hub kept failing while it sent or took files; the same command goes on where it stopped."""


class LockedError(HoneloomError):
    """Another process writes the same output."""


class MessageError(HoneloomError):
    """What a federated client or its server sent is not what was agreed; the sender is named by who catches it."""


class NotFiniteError(HoneloomError):
    """A loss, gradient or tensor is NaN or infinite."""


class OutOfMemoryError(HoneloomError):
    """A device or the host has not enough memory; the message names what was needed, what is free, and what helps."""


class OutOfSpaceError(HoneloomError):
    """The disk has not enough room; the message names the bytes needed and free."""


class VerificationError(HoneloomError):
    """A result is not what it claims to be."""

    exit_code = 3
