"""The order of the data over drawn mixtures, caps, stages, skips and hosts."""

import dataclasses
import functools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import ArraySource, Batches, DataStage, Document, Share, pack_source
from tests.refuses import refuses

SEQ_LEN = 8
NAMES = ("web", "books", "code")


@functools.cache
def source(name, num_rows, seq_len=SEQ_LEN):
    """One document per row, whose tokens identify source, row and place."""
    base = 1_000_000 * (NAMES.index(name) + 1)
    documents = (
        Document(base + 100 * row + np.arange(seq_len + 1, dtype=np.int32), seq_len)
        for row in range(num_rows)
    )
    tokens = ArraySource.from_documents(documents)
    packed = pack_source(tokens, seq_len, name=name)
    assert packed.num_rows == num_rows
    return packed


@dataclasses.dataclass(frozen=True)
class Case:
    """A drawn run: `read(batches)` is what its first `num_steps` steps read."""

    sources: tuple
    stages: tuple
    skips: tuple
    seed: int
    block: int
    num_steps: int

    def batches(self, skips=None):
        stream = Batches(self.sources, self.stages, seed=self.seed, block=self.block)
        for at, rows in self.skips if skips is None else skips:
            stream = stream.skipped(at, rows)
        return stream


@st.composite
def mixtures(draw, names):
    """Shares of which at least one has no cap."""
    free = draw(st.sampled_from(names))
    shares = []
    for name in draw(st.permutations(names)):
        weight = draw(st.sampled_from([1, 2, 0.5, 0.3, 1 / 3]))
        cap = {}
        if name != free:
            weight = draw(st.sampled_from([weight, 0]))
            kind = draw(st.sampled_from(["max_epochs", "max_rows", "max_tokens", None]))
            if kind == "max_epochs":
                cap = {kind: draw(st.sampled_from([1, 1.5, 2]))}
            elif kind:
                cap = {kind: draw(st.integers(1, 30)) * (SEQ_LEN if kind == "max_tokens" else 1)}
        shares.append(Share(name, weight, **cap))
    return tuple(shares)


@st.composite
def cases(draw):
    names = NAMES[: draw(st.integers(1, 3))]
    sources = tuple(source(name, draw(st.sampled_from([1, 3, 7, 20]))) for name in names)
    ends = sorted(draw(st.sets(st.integers(1, 15), max_size=3)))
    mixture = draw(mixtures(names))
    stages = []
    for first in [0, *ends]:
        if draw(st.booleans()):
            mixture = draw(mixtures(names))
        stages.append(DataStage(draw(st.integers(1, 6)), mixture, first))
    skips = draw(st.lists(st.tuples(st.integers(0, 18), st.integers(1, 25)), max_size=3))
    return Case(
        sources, tuple(stages), tuple(skips), draw(st.integers(0, 5)),
        draw(st.sampled_from([12, 30])), 20,
    )  # fmt: skip


def read(batches, num_steps):
    """(source name, plan row) of each row of each step."""
    names = batches.timeline.names
    return [
        [(names[s], r) for s, r in zip(*map(np.ndarray.tolist, batches.rows(n)), strict=True)]
        for n in range(num_steps)
    ]


def all_rows(batches, num_steps):
    """(source name, plan row) of each global row up to the end of the last step."""
    end = batches.timeline.first_row(num_steps - 1) + batches.batch_size(num_steps - 1)
    which, rows = batches.locate(np.arange(end))
    return [(batches.timeline.names[s], r) for s, r in zip(which, rows.tolist(), strict=True)]


def check_epochs(sources, rows):
    """An epoch of a source is each of its rows once."""
    for data in sources:
        drawn = [row for name, row in rows if name == data.name]
        for start in range(0, len(drawn), data.num_rows):
            epoch = drawn[start : start + data.num_rows]
            assert len(set(epoch)) == len(epoch)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_steps_read_every_global_row_once_but_those_skipped(case):
    batches = case.batches()
    steps, rows = read(batches, case.num_steps), all_rows(batches, case.num_steps)
    at = 0
    for n, step in enumerate(steps):
        at += sum(skip for s, skip in case.skips if s == n)
        assert batches.timeline.first_row(n) == at
        expected = [s for s in case.stages if s.first_step <= n][-1]
        assert len(step) == batches.batch_size(n) == expected.batch_size
        assert step == rows[at : at + len(step)]
        at += len(step)
    assert at == len(rows)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_an_epoch_of_a_source_is_each_of_its_rows_once(case):
    """Across phases, stages and skips."""
    batches = case.batches()
    rows = all_rows(batches, case.num_steps)
    check_epochs(case.sources, rows)
    # Before any step, by counting.
    for n in range(case.num_steps):
        before = [name for name, _ in rows[: batches.timeline.first_row(n)]]
        assert batches.epochs(n) == [before.count(d.name) / d.num_rows for d in case.sources]


@settings(max_examples=20, deadline=None)
@given(cases())
def test_shares_are_exact_in_blocks_and_caps_hold(case):
    """One stage: follows the rows block by block, with the shares that the caps leave."""
    stage = dataclasses.replace(case.stages[-1], batch_size=7, first_step=0)
    case = dataclasses.replace(case, stages=(stage,), skips=())
    rows = [name for name, _ in all_rows(case.batches(), 60)]
    sizes = {d.name: d.num_rows for d in case.sources}
    caps = {}
    for share in stage.mixture:
        some = [
            share.max_epochs and math.floor(share.max_epochs * sizes[share.source]),
            share.max_rows,
            share.max_tokens and share.max_tokens // SEQ_LEN,
        ]
        caps[share.source] = min((c for c in some if c is not None), default=math.inf)
    weights = {s.source: Fraction(str(float(s.weight))) for s in stage.mixture if s.weight}
    given = dict.fromkeys(caps, 0)
    start = 0
    while start < len(rows):
        live = {name: w for name, w in weights.items() if given[name] < caps[name]}
        quotas = {name: case.block * w / sum(live.values()) for name, w in live.items()}
        block = []
        for name in rows[start : start + case.block]:
            given[name] += 1
            block.append(name)
            if given[name] == caps[name]:
                break  # the next block starts here, without this source
        start += len(block)
        for name in set(rows):
            assert block.count(name) < quotas.get(name, 0) + 1
            if len(block) == case.block:
                assert abs(block.count(name) - quotas.get(name, 0)) < 1
    assert all(given[name] <= cap for name, cap in caps.items())


@settings(max_examples=15, deadline=None)
@given(cases(), st.integers(0, 19), st.randoms(use_true_random=False))
def test_hosts_read_the_parts_of_one_batch(case, step, random):
    batches = case.batches()
    whole = batches.host_batch(step)
    rows = list(range(batches.batch_size(step)))
    random.shuffle(rows)
    cut = random.randrange(len(rows) + 1)
    for part in (rows[:cut], rows[cut:]):
        for name, array in case.batches().host_batch(step, part).items():
            np.testing.assert_array_equal(array, whole[name][part])
    # The tokens are those of the rows that the order names.
    for i, (name, row) in enumerate(read(batches, step + 1)[step]):
        first = 1_000_000 * (NAMES.index(name) + 1)
        [document] = {(t - first) // 100 for t in whole["ids"][i].tolist()}
        data = next(d for d in case.sources if d.name == name)
        assert document == data.row(row)[1][0, 0]


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 20))
def test_a_restart_at_any_step_goes_straight_on(case, stop):
    batches = case.batches()
    straight = read(batches, case.num_steps)
    state = json.loads(json.dumps(batches.state(stop)))
    resumed = case.batches(skips=()).resume(state)
    assert read(resumed, case.num_steps) == straight
    assert resumed.state(99) == batches.state(99)
    assert resumed.check(state) == stop


@settings(max_examples=20, deadline=None)
@given(cases(), st.data())
def test_a_changed_configuration_starts_a_recorded_stage(case, data):
    """Restarts with other batch sizes and mixtures: the past stays, and no row is lost between."""
    stream, expected, stops = case.batches(), [], [0]
    for stop in sorted(data.draw(st.sets(st.integers(1, 19), min_size=1, max_size=3))):
        expected += read(stream, stop)[stops[-1] :]
        state = json.loads(json.dumps(stream.state(stop)))
        mixture = data.draw(mixtures([s.name for s in case.sources]))
        stages = data.draw(
            st.sampled_from(
                [[DataStage(3, mixture)], [DataStage(2, mixture), DataStage(5, mixture, stop + 1)]]
            )
        )
        new = Batches(case.sources, stages, seed=case.seed, block=case.block)
        stream = new.resume(state)
        assert stream.batch_size(stop) == new.batch_size(stop)
        stops.append(stop)
    assert read(stream, stops[-1]) == expected
    assert read(stream.resume(stream.state(20)), 20) == read(stream, 20)
    check_epochs(case.sources, all_rows(stream, 20))


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 19), st.integers(1, 30))
def test_a_skip_moves_what_follows_and_nothing_before(case, at, num_rows):
    before = case.batches()
    after = before.skipped(at, num_rows)
    assert read(after, at) == read(before, at)
    assert after.timeline.first_row(at) == before.timeline.first_row(at) + num_rows
    if at >= case.stages[-1].first_step:
        # In the last stage, what follows are the rows that would have been read later.
        first = before.timeline.first_row(at) + num_rows
        whole = np.concatenate(before.locate(np.arange(first, first + after.batch_size(at))))
        np.testing.assert_array_equal(np.concatenate(after.rows(at)), whole)
    assert before.skips == sorted(case.skips)


@settings(max_examples=15, deadline=None)
@given(cases(), st.integers(1, 6))
def test_a_batch_size_ramp_moves_no_row(case, batch_size):
    mixture = case.stages[0].mixture
    stages = [DataStage(1, mixture), DataStage(4, mixture, 3), DataStage(batch_size, mixture, 7)]
    ramped = Batches(case.sources, stages, seed=case.seed, block=case.block)
    plain = Batches(case.sources, [DataStage(5, mixture)], seed=case.seed, block=case.block)
    assert [ramped.batch_size(n) for n in (0, 2, 3, 6, 7, 99)] == [1, 1, 4, 4, *[batch_size] * 2]
    rows = all_rows(ramped, 20)
    assert all_rows(plain, 30)[: len(rows)] == rows[:150]


def test_long_runs_take_no_longer():
    """A row far out is found without passing over those before it."""
    sources = [source("web", 20), source("books", 7)]
    mixture = (Share("web", 1), Share("books", 1, max_rows=10**12))
    batches = Batches(sources, [DataStage(8, mixture)], num_steps=10**12)
    late = 10**12 // 4
    assert {batches.timeline.names[s] for s in batches.rows(late - 200)[0]} == {"web", "books"}
    assert {batches.timeline.names[s] for s in batches.rows(late + 200)[0]} == {"web"}
    assert batches.epochs(10**12)[1] == 10**12 / 7


def test_too_many_steps_for_the_caps():
    sources = [source("web", 20), source("books", 7)]
    mixture = (Share("web", max_epochs=2), Share("books", max_rows=5))
    stage = DataStage(4, mixture)
    planned = Batches(sources, [stage], num_steps=11)
    refuses(
        lambda: Batches(sources, [stage], num_steps=12),
        "12 steps need 48 rows, beyond what the caps", "allow: 45 rows, enough for 11 steps "
        "(rows at most, by source: web 40, books 5); raise max_epochs", "steps to 11",
    )  # fmt: skip
    endless = Batches(sources, [stage])
    assert len(endless.rows(10)[0]) == 4
    refuses(lambda: endless.host_batch(11), "global row 47 is beyond", "45 rows, enough for 11")
    planned.skipped(3, 1)
    words = "45 rows, 2 of them skipped, enough for 10 steps"
    refuses(lambda: planned.skipped(3, 2), words)
    # An earlier stage runs out although a later one would not.
    later = DataStage(4, (Share("web"),), 12)
    refuses(lambda: Batches(sources, [stage, later]), "12 steps need 48 rows")
    # A source that is spent before its stage begins.
    spent = DataStage(4, (Share("books", max_rows=5),), 5)
    words = ("6 steps need 24 rows", "enough for 5 steps")
    refuses(lambda: Batches(sources, [stage, spent]), *words)


def test_stages_of_their_own():
    """A longer sequence is another source; rows skipped at a stage's first step are the stage's."""
    short, long = source("web", 20), source("books", 7, seq_len=32)
    stages = [DataStage(4, (Share("web"),)), DataStage(2, (Share("books"),), 3)]
    batches = Batches([short, long], stages)
    assert [batches.host_batch(n)["ids"].shape for n in (2, 3)] == [(4, SEQ_LEN), (2, 32)]
    assert [batches.seq_len(n) for n in (2, 3)] == [SEQ_LEN, 32]
    assert batches.skipped(3, 5).epochs(3) == [12 / 20, 5 / 7]


def test_tokens_are_counted_without_skipped_rows():
    batches = Batches([source("web", 20)], [DataStage(2), DataStage(4, None, 3)])
    for each in (batches, batches.skipped(1, 9)):
        assert each.num_tokens(5) == pytest.approx((3 * 2 + 2 * 4) * SEQ_LEN)


def test_order_depends_on_names_not_places():
    web, books = source("web", 20), source("books", 7)
    mixture = (Share("web"), Share("books"))
    one = Batches([web, books], [DataStage(4, mixture)])
    other = Batches([books, web], [DataStage(4, mixture)])
    assert read(one, 10) == read(other, 10)


def test_a_source_may_join_and_leave():
    web, books = source("web", 20), source("books", 7)
    first = Batches([web], 4)
    second = Batches([web, books], 4).resume(first.state(3))
    assert read(second, 3) == read(first, 3)
    assert {name for name, _ in read(second, 9)[5]} <= {"web", "books"}
    third = Batches([books], 4).resume(second.state(9))
    assert third.rows(9)[0].tolist() == [0] * 4
    assert third.resume(third.state(12)).state(99) == third.state(99)
    assert read(third, 9) == read(second, 9)
    refuses(lambda: third.host_batch(1), "step 1 reads source 'web'", "no longer has")
    renamed = Batches([dataclasses.replace(web, name="net")], 4)
    words = "source 'net' is what the checkpoint calls 'web'; name"
    refuses(lambda: renamed.resume(first.state(3)), words)


def test_check_names_what_differs():
    web, books = source("web", 20), source("books", 7)
    batches = Batches([web], 4, seed=1)
    state = batches.state(9)
    assert Batches([web], 4, seed=1, num_steps=99).check(state) == 9
    assert Batches([web], [DataStage(4), DataStage(8, None, 9)], seed=1).check(state) == 9
    before = "batch size or mixture before step 9 differs"
    refuses(lambda: Batches([web], 8, seed=1).check(state), before, "batch_size=8", "batch_size=4")
    refuses(lambda: Batches([web, books], 4, seed=1).check(state), before)
    words = "seed=2 differs from the checkpoint's 1"
    refuses(lambda: Batches([web], 4, seed=2).resume(state), words)
    words = "block=10 differs from the checkpoint's 1000"
    refuses(lambda: Batches([web], 4, seed=1, block=10).resume(state), words)
    changed = Batches([source("web", 7)], 4, seed=1)
    refuses(lambda: changed.resume(state), "plan of source 'web' is", "another name")
    skipped = batches.skipped(9, 5).state(9)
    words = ("skips before step 9 differs: []", "[(9, 5)]", "resume")
    refuses(lambda: batches.check(skipped), *words)
    old = {"step": 9, "row_offset": 0, "batch_size": 4, "plan_hash": "abc"}
    refuses(lambda: batches.resume(old), "version is None", "the code that wrote it")


def test_bad_stages_and_skips():
    web, books = source("web", 20), source("books", 7)
    for words, *stages in (
        ("first steps [] of the stages must be 0",),
        ("first steps [3] of the stages must be 0 and then grow", DataStage(4, None, 3)),
        ("first steps [0, 0]", DataStage(4), DataStage(4)),
        ("first steps [0, 5, 3]", DataStage(4), DataStage(4, None, 5), DataStage(4, None, 3)),
        ("batch_size=0 of stage 1", DataStage(4), DataStage(0, None, 3)),
    ):
        refuses(lambda stages=stages: Batches([web, books], stages), words)
    for words, *mixture in (
        ("a mixture of ['wbe'] must name each source once, out of ['web', ", Share("wbe")),
        ("name each source once", Share("web"), Share("web")),
        ("not all zero", Share("web", 0)),
        ("not negative", Share("web"), Share("books", -1)),
        ("gives no row in a block of 1000", Share("web"), Share("books", 1e-4)),
        ("max_epochs=0 of source 'web' must be above", Share("web", max_epochs=0)),
        ("allows not one of its 20 rows of 8", Share("web", max_epochs=0.01)),
        ("max_tokens=7 of source 'web' allows not one", Share("web", max_tokens=7)),
    ):
        stage = DataStage(4, tuple(mixture))
        refuses(lambda stage=stage: Batches([web, books], [stage]), words)
    batches = Batches([web], 4)
    for at, rows in ((-1, 3), (3, 0)):
        refuses(lambda a=at, r=rows: batches.skipped(a, r), f"rows={rows}", f"at_step={at}")


def test_caps_are_decimal_and_exact():
    assert Share("a", max_epochs=0.29).limit(100, 8) == 29
    assert Share("a", max_epochs=2.5, max_rows=300, max_tokens=8 * 240 + 7).limit(100, 8) == 240
    assert Share("a").limit(100, 8) is None
