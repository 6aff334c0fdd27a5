"""Secure sums: equal to the plain ones whoever drops out, shut below the threshold, and deaf to hostile messages."""

import hashlib
import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.errors import ConfigError, MessageError, NotFiniteError
from honeloom.federated import secagg
from honeloom.federated.secagg import ClientSecrets, RoundAbortedError, SecureRound
from honeloom.federated.secagg_masks import combined, weights_at_zero

SIZE = 64


def stream_of(seed):
    """Bytes by seed and call, in place of the system's."""
    calls = itertools.count()

    def entropy(count):
        return hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(count)

    return entropy


def wire(message):
    return json.loads(json.dumps(message))


class Run:
    """All parties of one round; state and messages go through JSON as on a real transport."""

    def __init__(self, clients, threshold=None, *, number=3, experiment="e", seed=0):
        self.names = [f"c{i:03d}" for i in range(clients)]
        self.round = SecureRound(experiment, number, threshold or secagg.default_threshold(clients))
        self.entropy = {n: stream_of(f"{seed}/{n}") for n in self.names}
        self.kept, self.sent = {}, []

    def keep(self, name, after, message):
        self.kept[name] = wire(after.to_json())
        self.sent.append(json.dumps(message))
        return wire(message)

    def state(self, name):
        return ClientSecrets.from_json(self.kept[name])

    def announce(self, names):
        read = []
        for n in names:
            message = self.keep(n, *secagg.begin(self.round, n, self.entropy[n]))
            read.append(secagg.read_keys(self.round, n, message))
        self.roster = wire(secagg.roster_message(self.round, read))
        self.keys = secagg.read_roster(self.round, self.roster)

    def share(self, names):
        self.shares = {}
        for n in names:
            message = self.keep(n, *secagg.share(self.state(n), self.roster, self.entropy[n]))
            self.shares[n] = secagg.read_shares(self.round, n, message, self.keys)
        self.deliveries = wire(secagg.delivery_messages(self.round, self.shares))

    def mask(self, names, vectors):
        self.masked = {}
        for n in names:
            after, data = secagg.mask(self.state(n), self.deliveries[n], vectors[n])
            self.kept[n] = wire(after.to_json())
            self.masked[n] = secagg.read_masked(data, len(vectors[n]))
        self.survivors = wire(secagg.survivors_message(self.round, self.masked))

    def reveal(self, names):
        self.reveals = []
        for n in names:
            message = self.keep(n, *secagg.reveal(self.state(n), self.survivors))
            self.reveals.append(secagg.read_reveal(self.round, n, message, self.shares, self.masked))

    def unmask(self):
        return secagg.unmask(self.round, self.keys, self.masked, self.reveals)

    def all(self, vectors, *, silent=0, unmasked=0, unshared=0, absent=0):
        """The last so many clients are lost: before the answer, the vector, the shares, or from the start."""
        names = self.names[: len(self.names) - absent]
        self.announce(names)
        names = names[: len(names) - unshared]
        self.share(names)
        names = names[: len(names) - unmasked]
        self.mask(names, vectors)
        self.reveal(names[: len(names) - silent])
        return names, self.unmask()


def random_vectors(run, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 1 << 64, size, dtype=np.uint64) for n in run.names}


def plain(vectors, names):
    return np.add.reduce([vectors[n] for n in names])


# Sums


@pytest.mark.parametrize(
    "lost", [{}, {"silent": 1}, {"unmasked": 1}, {"unshared": 1}, {"absent": 1}, {"silent": 1, "unmasked": 1}]
)
def test_the_sum_is_that_of_the_survivors_to_the_last_bit(lost):
    run = Run(7)
    vectors = random_vectors(run)
    names, total = run.all(vectors, **lost)
    assert np.array_equal(total, plain(vectors, names))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_number_threshold_and_losses(data):
    clients = data.draw(st.integers(3, 10))
    threshold = data.draw(st.integers(clients // 2 + 1, clients))
    losses, left = {}, clients
    for kind in ("absent", "unshared", "unmasked", "silent"):
        losses[kind] = data.draw(st.integers(0, min(2, left)))
        left -= losses[kind]
    run = Run(clients, threshold, seed=clients)
    vectors = random_vectors(run, 8, clients)
    if left < threshold or left + losses["silent"] < 3:
        with pytest.raises(RoundAbortedError):
            run.all(vectors, **losses)
    else:
        names, total = run.all(vectors, **losses)
        assert np.array_equal(total, plain(vectors, names))


def test_answers_more_than_the_threshold_change_nothing():
    run = Run(6)
    vectors = random_vectors(run)
    _, total = run.all(vectors)
    run.reveals = run.reveals[-run.round.threshold :]
    assert np.array_equal(run.unmask(), total)


def test_fifty_clients():
    run = Run(50)
    vectors = random_vectors(run, 1024)
    begun = time.perf_counter()
    names, total = run.all(vectors, silent=2, unmasked=3, unshared=1)
    print(f"50 clients, K=1024, all parties in one process: {time.perf_counter() - begun:.2f} s")
    assert np.array_equal(total, plain(vectors, names))


# Numbers


def test_weighted_means_to_the_stated_tolerance():
    run = Run(9)
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(9))
    values = {n: rng.normal(0, 50, 256) for n in run.names}
    vectors = {n: secagg.quantise(values[n], w, 100.0) for n, w in zip(run.names, weights, strict=True)}
    _, total = run.all(vectors)
    wanted = sum(w * np.clip(values[n], -100, 100) for n, w in zip(run.names, weights, strict=True))
    apart = np.abs(secagg.dequantise(total) - wanted).max()
    assert apart <= secagg.tolerance(9, 100.0) < 2e-9


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e300, 1e300), st.floats(0, 1), st.integers(0, 40))
def test_one_number_there_and_back(value, weight, bits):
    found = secagg.dequantise(secagg.quantise(np.array([value]), weight, 1000.0, bits), bits)[0]
    assert abs(found - weight * max(-1000.0, min(1000.0, value))) <= secagg.tolerance(1, 1000.0, bits)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_thousand_largest_numbers_do_not_overflow(sign):
    clip = 2.0**31 / 1000 * 0.999999
    one = secagg.quantise(np.array([sign * 1e18]), 1.0, clip)
    assert secagg.dequantise(one * np.uint64(1000))[0] == pytest.approx(sign * 1000 * clip, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(bad):
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        secagg.quantise(np.array([1.0, bad]), 1.0, 10.0)


@pytest.mark.parametrize(
    ("weight", "clip", "bits"),
    [
        (-0.1, 1, 32),
        (1.1, 1, 32),
        (np.nan, 1, 32),
        (1, 0, 32),
        (1, np.nan, 32),
        (1, np.inf, 32),
        (1, 2.2e6, 32),
        (1, 1, 63),
    ],
)
def test_settings_that_could_overflow(weight, clip, bits):
    with pytest.raises(ConfigError):
        secagg.quantise(np.ones(1), weight, clip, bits)


def test_thresholds():
    assert [secagg.default_threshold(n) for n in (3, 4, 5, 50, 1000)] == [2, 3, 3, 26, 501]
    for clients in (0, 1, 2, 1001):
        with pytest.raises(ConfigError, match="subtract"):
            secagg.default_threshold(clients)


@settings(max_examples=30, deadline=None)
@given(secret=st.binary(min_size=16, max_size=16), clients=st.integers(2, 40), data=st.data())
def test_shares_are_combined_as_the_library_does(secret, clients, data):
    threshold = data.draw(st.integers(2, clients))
    shares = Shamir.split(threshold, clients, secret)
    chosen = data.draw(st.permutations(shares))[:threshold]
    weights = weights_at_zero([place for place, _ in chosen])
    assert combined(weights, [held for _, held in chosen]) == Shamir.combine(chosen) == secret


# What is not learnt


def test_at_the_threshold_and_one_below():
    run = Run(7)
    vectors = random_vectors(run)
    run.all(vectors)
    run.reveals = run.reveals[: run.round.threshold]
    assert np.array_equal(run.unmask(), plain(vectors, run.names))
    run.reveals = run.reveals[:-1]
    with pytest.raises(RoundAbortedError, match="3 clients gave their shares, and it takes 4"):
        run.unmask()
    run.reveals = [*run.reveals, run.reveals[0]]  # one that answers twice counts once
    with pytest.raises(RoundAbortedError):
        run.unmask()


def test_shares_below_the_threshold_fit_every_secret():
    """For any secret there is a last share with which the shares at hand give it: they say nothing about it."""
    run = Run(5)
    run.all(random_vectors(run))
    places = [1, 2, 3]
    held = [r.seeds["c004"] for r in run.reveals[:2]]
    weights = weights_at_zero(places)
    to_last = pow_inverse(weights[2])
    for secret in (bytes(16), b"\xff" * 16, b"another secret!!"):
        rest = int.from_bytes(combined(weights[:2], held), "big") ^ int.from_bytes(secret, "big")
        last = combined([to_last], [rest.to_bytes(16, "big")])
        assert Shamir.combine(list(zip(places, [*held, last], strict=True))) == secret


def pow_inverse(a):
    """a ** (2**128 - 2), its inverse in the field."""
    found = (1).to_bytes(16, "big")
    square = a.to_bytes(16, "big")
    for _ in range(127):
        square = combined([int.from_bytes(square, "big")], [square])
        found = combined([int.from_bytes(found, "big")], [square])
    return int.from_bytes(found, "big")


def test_masks_do_not_depend_on_vectors():
    """With the same secrets, changed vectors of the same sum: each masked one shifts by the change, the sum stays."""
    first, second = Run(5, seed=1), Run(5, seed=1)
    vectors = random_vectors(first)
    change = np.arange(SIZE, dtype=np.uint64) << np.uint64(50)
    moved = {**vectors, "c000": vectors["c000"] + change, "c001": vectors["c001"] - change}
    (_, one), (_, two) = first.all(vectors), second.all(moved)
    assert np.array_equal(one, two)
    assert np.array_equal(second.masked["c000"] - first.masked["c000"], change)
    assert np.array_equal(second.masked["c001"] - first.masked["c001"], -change)
    assert all(np.array_equal(second.masked[n], first.masked[n]) for n in first.names[2:])


def test_a_masked_vector_looks_uniform_and_sums_need_the_seeds():
    run = Run(4)
    nothing = {n: np.zeros(4096, dtype=np.uint64) for n in run.names}
    run.all(nothing)
    for masked in run.masked.values():
        counts = np.bincount(np.frombuffer(masked.tobytes(), dtype=np.uint8), minlength=256)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 150 < chi2 < 380  # 255 degrees of freedom, over five standard deviations around
        bits = np.unpackbits(np.frombuffer(masked.tobytes(), dtype=np.uint8)).mean()
        assert abs(bits - 0.5) < 5 * 0.5 / np.sqrt(masked.size * 64)
    assert plain(run.masked, run.names).any()  # pair masks are gone, own masks are not
    found = [
        np.corrcoef(run.masked[a].astype(float), run.masked[b].astype(float))[0, 1]
        for a, b in itertools.combinations(run.names, 2)
    ]
    assert np.abs(found).max() < 6 / np.sqrt(4096)


def test_no_message_holds_a_secret_and_no_state_outlives_its_use():
    run = Run(5)
    run.announce(run.names)
    secrets = [s for kept in run.kept.values() for s in kept["secrets"]]
    assert all(len(s) == 32 for s in secrets)
    run.share(run.names)
    run.mask(run.names[:4], random_vectors(run))
    assert all(run.kept[n]["secrets"] == ["", "", ""] and run.kept[n]["keys"] == [] for n in run.names[:4])
    run.reveal(run.names[:4])
    assert not any(secret in sent for secret in secrets for sent in run.sent)
    for name in run.names[:4]:
        state = run.state(name)
        assert set(state.seed_shares) == set(run.names[:4]) and set(state.key_shares) == {"c004"}
    assert not any(s in repr(Run.state(run, "c004")) for s in run.kept["c004"]["secrets"])


def test_rounds_experiments_and_clients_have_other_masks():
    """The same bytes of entropy, to see that the context alone parts them."""
    found = []
    for number, experiment in ((1, "e"), (2, "e"), (1, "f")):
        run = Run(4, number=number, experiment=experiment)
        run.entropy = {n: stream_of(n) for n in run.names}
        run.all({n: np.zeros(8, dtype=np.uint64) for n in run.names})
        found += [m.tobytes() for m in run.masked.values()]
    assert len(set(found)) == len(found)


# Survivor lists


def masked_run(lost=1):
    run = Run(7)
    run.announce(run.names)
    run.share(run.names)
    run.mask(run.names[: 7 - lost], random_vectors(run))
    return run


@pytest.mark.parametrize(
    ("survivors", "says"),
    [
        (["c001", "c002", "c003", "c004"], "is not in the list"),
        (["c000", "c001", "c002"], "3 clients, and it takes 4"),
        (["c000", "c001", "c002", "x"], "'x' is no client"),
        (["c000", "c001", "c002", "c002"], "twice"),
        ([], "is not in the list"),
        ("c000c001", "no list"),
        ([["c000"]], "no client's name"),
        ([0, 1, 2, 3], "no client's name"),
        (["c"] * 2000, "at most 1000"),
    ],
)
def test_forged_survivors(survivors, says):
    run = masked_run()
    with pytest.raises(MessageError, match=says):
        secagg.reveal(run.state("c000"), {**run.survivors, "survivors": survivors})


def test_a_second_list_is_refused_and_the_first_may_be_repeated():
    run = masked_run()
    run.reveal(run.names[:6])
    again, message = secagg.reveal(run.state("c000"), {**run.survivors, "survivors": run.survivors["survivors"][::-1]})
    assert json.dumps(message) in run.sent and again == run.state("c000")
    for other in (run.names[:5], run.names):
        with pytest.raises(MessageError, match="answered before"):
            secagg.reveal(run.state("c000"), {**run.survivors, "survivors": other})


def test_never_both_kinds_of_one_client():
    run = masked_run(lost=2)
    run.reveal(run.names[:5])
    for answer in run.reveals:
        assert set(answer.seeds) == set(run.names[:5]) and set(answer.keys) == set(run.names[5:])


def test_a_sum_of_two_is_never_opened():
    run = Run(3)
    run.announce(run.names)
    run.share(run.names)
    with pytest.raises(RoundAbortedError, match="2 clients sent a vector, and a sum takes 3"):
        run.mask(run.names[:2], random_vectors(run))
    with pytest.raises(MessageError, match="2 clients, and it takes 3"):
        secagg.reveal(run.state("c000"), run.round.message("survivors", survivors=["c000", "c001"]))


# Hostile messages


def begun(clients=4):
    run = Run(clients)
    run.announce(run.names)
    return run


ROSTERS = {
    "another round": (lambda r: r.update(round=4), "of round 4"),
    "another experiment": (lambda r: r.update(experiment="x"), "'x'"),
    "a threshold of the server's": (lambda r: r.update(threshold=2), "threshold 2"),
    "duplicates": (lambda r: r["keys"].append(r["keys"][1]), "twice"),
    "one key for two": (lambda r: r["keys"][1].__setitem__(1, r["keys"][2][1]), "a key is there twice"),
    "itself missing": (lambda r: r["keys"].pop(0), "missing"),
    "itself changed": (lambda r: r["keys"][0].__setitem__(1, "ab" * 32), "missing or not those"),
    "too few": (lambda r: r["keys"].__delitem__(slice(1, 3)), "2 clients"),
    "so many that two groups open masks": (
        lambda r: r["keys"].extend([[f"x{i}", f"{i:064x}", f"{i + 9:064x}", "0" * 32] for i in range(2)]),
        "3 to 5",
    ),
    "short keys": (lambda r: r["keys"][1].__setitem__(1, "ab"), "32 bytes"),
    "no hex": (lambda r: r["keys"][1].__setitem__(1, "zz" * 32), "32 bytes"),
    "numbers": (lambda r: r["keys"][1].__setitem__(1, 5), "32 bytes"),
    "rows of three": (lambda r: r["keys"][1].pop(), "4 parts"),
    "no list": (lambda r: r.update(keys={"a": 1}), "no list"),
    "more fields": (lambda r: r.update(more=1), "not a message"),
    "fewer fields": (lambda r: r.pop("threshold"), "not a message"),
    "a round that is true": (lambda r: r.update(round=True), "round True"),
    "another phase": (lambda r: r.update(phase="reveal"), "phase 'reveal'"),
    "an empty name": (lambda r: r["keys"][1].__setitem__(0, ""), "no client's name"),
}


@pytest.mark.parametrize("case", ROSTERS)
def test_hostile_rosters(case):
    change, says = ROSTERS[case]
    run = begun()
    change(run.roster)
    with pytest.raises(MessageError, match=says):
        secagg.share(run.state("c000"), run.roster)


@pytest.mark.parametrize("message", [None, [], "x", 5, {}, {"phase": "roster"}])
def test_what_is_no_message(message):
    run = begun()
    for handle in (
        lambda: secagg.share(run.state("c000"), message),
        lambda: secagg.read_keys(run.round, "c000", message),
        lambda: secagg.read_shares(run.round, "c000", message, run.keys),
        lambda: secagg.read_reveal(run.round, "c000", message, run.names, run.names),
        lambda: secagg.reveal(replace(run.state("c000"), phase=3), message),
        lambda: ClientSecrets.from_json(message),
    ):
        with pytest.raises(MessageError):
            handle()


def test_a_key_that_everybody_knows():
    run = begun()
    run.roster["keys"][1][1] = "0" * 64
    with pytest.raises(MessageError, match="'c001' is no sound X25519 key"):
        secagg.share(run.state("c000"), run.roster)


def test_clients_that_speak_for_others_or_leave_some_out():
    run = begun()
    kept, message = secagg.share(run.state("c000"), run.roster)
    with pytest.raises(MessageError, match="'c001' sent a message of 'c000'"):
        secagg.read_shares(run.round, "c001", message, run.keys)
    with pytest.raises(MessageError, match="sent 2, and 3"):
        secagg.read_shares(run.round, "c000", {**message, "shares": message["shares"][:2]}, run.keys)
    with pytest.raises(MessageError, match="no client"):
        secagg.read_shares(run.round, "c000", {**message, "shares": [["x", "0" * 120]]}, run.keys)
    with pytest.raises(MessageError, match="60 bytes"):
        secagg.read_shares(run.round, "c000", {**message, "shares": [["c001", "0" * 118]]}, run.keys)
    with pytest.raises(MessageError, match="phase 2"):
        secagg.share(kept, run.roster)
    with pytest.raises(MessageError, match="8 bytes, expected 16"):
        secagg.read_masked(bytes(8), 2)


def test_shares_of_another_round_are_refused_even_with_a_forged_number():
    old, new = Run(4, number=3, seed=1), Run(4, number=4, seed=2)
    for run in (old, new):
        run.announce(run.names)
        run.share(run.names)
    vector = np.zeros(4, dtype=np.uint64)
    with pytest.raises(MessageError, match="of round 3"):
        secagg.mask(new.state("c000"), old.deliveries["c000"], vector)
    with pytest.raises(MessageError, match="another round or roster"):
        secagg.mask(new.state("c000"), {**old.deliveries["c000"], "round": 4}, vector)


def test_shares_of_another_round_do_not_open_under_the_same_keys():
    """Were a client's entropy to repeat itself, the round in every key would still part the two."""
    old, new = Run(4, number=3), Run(4, number=4)
    for run in (old, new):
        run.announce(run.names)
        run.share(run.names)
    with pytest.raises(MessageError, match="another round or roster"):
        secagg.mask(new.state("c000"), {**old.deliveries["c000"], "round": 4}, np.zeros(4, dtype=np.uint64))


DELIVERIES = {
    "damaged": (lambda d: d["shares"][0].__setitem__(1, "00" * 60), "damaged"),
    "swapped senders": (
        lambda d: (a := d["shares"][0], b := d["shares"][1], a.__setitem__(0, b[0]), b.__setitem__(0, "c001")),
        "damaged",
    ),
    "of too few": (lambda d: d["shares"].__delitem__(slice(1, 3)), "2 clients, and it takes 3"),
    "of itself": (lambda d: d["shares"][0].__setitem__(0, "c000"), "'c000' is no client"),
    "of unknown ones": (lambda d: d["shares"][0].__setitem__(0, "x"), "'x' is no client"),
    "twice": (lambda d: d["shares"].append(d["shares"][0]), "twice"),
    "for another": (lambda d: d.update(client="c002"), "for 'c002'"),
}


@pytest.mark.parametrize("case", DELIVERIES)
def test_hostile_deliveries(case):
    change, says = DELIVERIES[case]
    run = begun()
    run.share(run.names)
    change(run.deliveries["c000"])
    with pytest.raises(MessageError, match=says):
        secagg.mask(run.state("c000"), run.deliveries["c000"], np.zeros(4, dtype=np.uint64))


def test_a_second_delivery_is_refused():
    run = begun()
    run.share(run.names)
    run.mask(run.names, random_vectors(run))
    with pytest.raises(MessageError, match="phase 3"):
        secagg.mask(run.state("c000"), run.deliveries["c000"], np.ones(4, dtype=np.uint64))


def test_other_rosters_for_single_clients_are_found():
    """A server that shows one client a key of its own in place of another's cannot have its shares opened."""
    run = begun()
    forged = wire(run.roster)
    _, other = secagg.begin(run.round, "c003", stream_of("the server"))
    forged["keys"][3][1:] = [other["encryption"], other["masking"], other["commitment"]]
    run.share(run.names)
    _, message = secagg.share(
        ClientSecrets.from_json(wire(secagg.begin(run.round, "c000", stream_of("0/c000"))[0].to_json())), forged
    )
    run.deliveries["c001"]["shares"][0][1] = dict(message["shares"])["c001"]
    with pytest.raises(MessageError, match="'c000' are of another round or roster"):
        secagg.mask(run.state("c001"), run.deliveries["c001"], np.zeros(4, dtype=np.uint64))


def test_wrong_shares_open_no_wrong_sum():
    run = masked_run()
    run.reveal(run.names[:6])
    first = run.reveals[0]
    run.reveals[0] = replace(first, seeds={**first.seeds, "c003": bytes(16)})
    with pytest.raises(MessageError, match="the seed of 'c003'"):
        run.unmask()
    run.reveals[0] = replace(first, keys={"c006": bytes(16)})
    with pytest.raises(MessageError, match="the key of 'c006'"):
        run.unmask()


def test_answers_of_another_kind_than_asked_for():
    run = masked_run()
    _, message = secagg.reveal(run.state("c000"), run.survivors)
    swapped = {**message, "seeds": message["keys"], "keys": message["seeds"]}
    for bad in (swapped, {**message, "seeds": message["seeds"][1:]}):
        with pytest.raises(MessageError, match="shares of other clients"):
            secagg.read_reveal(run.round, "c000", bad, run.shares, run.masked)
    with pytest.raises(MessageError, match="none of the survivors"):
        secagg.read_reveal(run.round, "c006", {**message, "client": "c006"}, run.shares, run.masked)


def test_too_few_at_every_phase():
    run = Run(6)
    with pytest.raises(RoundAbortedError, match="3 clients announced keys, and a sum takes 4"):
        run.announce(run.names[:3])
    run.announce(run.names)
    with pytest.raises(RoundAbortedError, match="3 clients shared"):
        run.share(run.names[:3])


def test_damaged_state():
    run = begun()
    for change in (
        {"secrets": ["00", "00", "00"]},
        {"secrets": "x"},
        {"at": 5},
        {"at": 3},
        {"keys": 5},
        {"threshold": 0},
    ):
        with pytest.raises(MessageError):
            ClientSecrets.from_json({**run.kept["c000"], **change})


def test_vectors_are_words():
    run = begun()
    run.share(run.names)
    with pytest.raises(ValueError, match="quantise"):
        secagg.mask(run.state("c000"), run.deliveries["c000"], np.zeros(4))
