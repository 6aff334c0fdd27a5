"""Texts that written files are tried on: prose, code, numbers, scripts, spaces; and conversations."""

from __future__ import annotations

__all__ = ["CONVERSATIONS", "PROMPTS", "TEXTS"]

TEXTS = (
    "Once upon a time there was a small town by the sea, and every evening the lamps were lit one by one.",
    "What is two plus two? It is four. What is 17 * 23? Let me see: 17 * 20 = 340, 17 * 3 = 51, so it is 391.",
    "The cat sat on the mat. The dog did not like it at all, but it said nothing and went out into the garden.",
    "It's 2024, isn't it?\n\nYes: we'll see 3.14159 and 1,000,000.50 of them; they've DON'T'd.",
    'def area(radius):\n    """Of a circle."""\n    return 3.14159 * radius ** 2\n\n\nprint(f\'{area(2):>8.3f}\')\n',
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];  // dot product\n}\n",
    '{"name": "Lily", "age": 7, "likes": ["cats", "the sea"], "tall": null}',
    "  two spaces before, three   within, a tab\there, and some after   ",
    "a\r\nb\n\n\n  c \n \n",
    "naïve café, Ångström, Straße, Ελληνικά, Привет мир, 中文和漢字, 日本語のテキスト, 한국어, العربية, हिन्दी",
    "😀 👩‍👩‍👧 ½ ≤ ∞ → “quoted” – dashed — … №5 ¿qué? ΔE=mc²",
    "The patient was treated with 5 mg daily for two weeks; no side effects were reported in either group.",
)
"""In composed characters: a tokenizer may compose them first, and llama.cpp never does."""

PROMPTS = (
    "Once upon a time, there was a little girl who",
    "Question: What is the capital of France?\nAnswer:",
    "def fibonacci(n):\n    ",
)
"""What `serve-check` continues."""

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is two plus two?"},),
    (
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "  Another one,\nplease: {{ x }} "},
    ),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}),
)
