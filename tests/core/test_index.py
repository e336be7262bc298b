"""An index finds what a comparison with every row would."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oodcore import Index, Rows, index, search
from oodcore.errors import ConfigurationError, DataError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are faster so, on a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["faiss", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(search, "faiss_module", lambda: None)
    else:
        pytest.importorskip("faiss", reason="faiss is an extra")
    return str(request.param)


def random(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def brute(rows: Tensor, queries: Tensor, metric: str, normalized: bool) -> Tensor:
    """Every distance (or product) in float64, by differences, nearest first."""
    if normalized:
        rows, queries = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (rows, queries))
    if metric == "inner_product":
        return (queries[:, None] * rows).sum(2).sort(dim=1, descending=True).values
    return (queries[:, None] - rows).norm(dim=2).sort(dim=1).values


def clusters(count: int, width: int, spread: float) -> Tensor:
    centres = random(3, width, 1)
    centres = centres / centres.norm(dim=1, keepdim=True)
    return centres[torch.arange(count) % 3] + spread * random(count, width) / width**0.5


def problem(name: str, width: int) -> tuple[Tensor, Tensor]:
    """Rows and queries of a kind that is hard in its own way."""
    rows, queries = random(150, width), random(20, width, 2)
    if name == "offset":
        return rows + 1e6, queries + 1e6
    if name == "collapsed":
        both = clusters(170, width, 1e-4)
        return both[20:], both[:20]
    if name == "duplicates":
        return rows[torch.arange(150) % 9], torch.cat([rows[:9], queries])
    if name == "zeros":
        rows[::3] = 0.0
        return rows, torch.cat([rows[:3], queries])
    if name == "huge":
        return rows * 1e30, queries * 1e30
    if name == "tiny":
        return rows * 1e-30, queries * 1e-30
    if name == "of all sizes":
        exponents = torch.arange(150) % 24 - 12
        return rows * 10.0 ** exponents[:, None], queries * 10.0 ** exponents[:20, None]
    return rows, queries


NAMES = ("plain", "offset", "collapsed", "duplicates", "zeros", "huge", "tiny", "of all sizes")


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 2, 40])
def test_exact(name: str, width: int, metric: index.Metric, normalized: bool, engine: str) -> None:
    rows, queries = problem(name, width)
    searched = Index(Rows.of(rows), metric, normalized=normalized)
    everything = brute(rows, queries, metric, normalized)
    size = 1.0 if normalized else float(rows.norm(dim=1).max())
    # Distances are exact in their own size, unless they are 0; products in that of their factors.
    slack = torch.zeros(len(queries), 1, dtype=torch.float64)
    if metric == "inner_product":
        slack += 1e-12 * size * (1.0 if normalized else queries.norm(dim=1, keepdim=True))
    elif name in ("duplicates", "zeros"):
        slack += 1e-12 * size
    for k in (1, 5, 130, 150):
        expected = everything[:, :k]
        values, found = searched.search(queries, k)
        assert values.dtype == torch.float64
        assert values.shape == found.shape == (len(queries), k)
        allowed = 1e-9 * expected.abs() + slack
        assert ((values - expected).abs() <= allowed).all()
        assert ((searched.kth(queries, k) - expected[:, -1]).abs() <= allowed[:, -1]).all()
        assert found.sort(dim=1).values.diff(dim=1).gt(0).all(), "a row is found twice"
        assert (found.diff(dim=1).gt(0) | values.diff(dim=1).ne(0)).all(), "ties in another order"
        again = searched._values(searched.vectors(queries), found)
        assert torch.allclose(again, values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_do_not_depend_on_the_batch(name: str, engine: str) -> None:
    rows, queries = problem(name, 40)
    searched = Index(Rows.of(rows), normalized=name == "collapsed")
    together = searched.search(queries, 20)[0]
    for size in (1, 7):
        apart = torch.cat([searched.search(part, 20)[0] for part in torch.split(queries, size)])
        assert torch.allclose(apart, together, rtol=1e-12, atol=1e-300)
        kth = torch.cat([searched.kth(part, 20) for part in torch.split(queries, size)])
        assert torch.allclose(kth, together[:, -1], rtol=1e-12, atol=1e-300)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 60), width=st.integers(1, 6))
def test_exact_on_lattices_of_ties(data: st.DataObject, count: int, width: int) -> None:
    numbers = st.integers(-2, 2).map(float)
    row = st.lists(numbers, min_size=width, max_size=width)
    rows = torch.tensor(data.draw(st.lists(row, min_size=count, max_size=count)))
    queries = torch.tensor(data.draw(st.lists(row, min_size=3, max_size=3)))
    rows, queries = rows.double(), queries.double()
    k = data.draw(st.integers(1, count))
    for metric in ("l2", "inner_product"):
        expected = brute(rows, queries, metric, False)[:, :k]
        searched = Index(Rows.of(rows), metric)
        assert torch.allclose(searched.search(queries, k)[0], expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(searched.kth(queries, k), expected[:, -1], rtol=1e-12, atol=1e-12)


def test_rows_of_one_tight_cluster_are_found_beyond_float32(engine: str) -> None:
    # Far more rows are equally near, to float32, than are proposed.
    rows = clusters(3000, 16, 1e-7)
    searched = Index(Rows.of(rows), normalized=True)
    queries = clusters(40, 16, 3e-7)
    proposed = searched._proposed(CPU).propose(searched.vectors(queries), 10)
    assert bool(proposed.doubtful.all())
    expected = brute(rows, queries, "l2", True)[:, :10]
    assert torch.allclose(searched.search(queries, 10)[0], expected, rtol=1e-7)


@pytest.mark.parametrize("normalized", [False, True])
def test_differences_decide_where_products_cannot(normalized: bool, engine: str) -> None:
    rows, queries = random(600, 2), random(9, 2, 2)
    if normalized:
        rows, queries = rows + 1e6, queries + 1e6
    else:
        rows[:300] *= 1e-12
        rows[300:] *= 1e12
        queries *= 1e-12
    searched = Index(Rows.of(rows), normalized=normalized)
    expected = brute(rows, queries, "l2", normalized)[:, :5]
    assert torch.allclose(searched.search(queries, 5)[0], expected, rtol=1e-6, atol=0)
    assert torch.allclose(searched.kth(queries, 5), expected[:, -1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_queries_beyond_float32(metric: index.Metric, engine: str) -> None:
    rows, queries = random(9, 4), random(5, 4, 1) * 1e25
    for k in (3, 9):
        expected = brute(rows, queries, metric, False)[:, :k]
        assert torch.allclose(Index(Rows.of(rows), metric).search(queries, k)[0], expected)


def test_long_banks_are_searched_in_blocks(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 32)
    rows, queries = random(150, 5), random(6, 5, 1)
    searched = Index(Rows.of(rows))
    expected = brute(rows, queries, "l2", False)[:, :40]
    assert torch.allclose(searched.search(queries, 40)[0], expected, rtol=1e-12)
    exact = searched._values(queries, searched._exactly(queries, 40)).sort(dim=1).values
    assert torch.allclose(exact, expected, rtol=1e-12)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("name", ["plain", "offset", "collapsed"])
def test_closeness_is_what_it_says_to_within_its_slack(
    name: str, metric: index.Metric, engine: str
) -> None:
    rows, queries = problem(name, 40)
    searched = Index(Rows.of(rows), metric)
    proposer = searched._proposed(CPU)
    for proposed in (proposer.propose(queries, 5), proposer.exactly(queries, 5)):
        true = searched._values(queries, proposed.found) * proposer.scale
        true = -true.square() if metric == "l2" else true * proposer.scale
        assert ((proposed.closeness - true).abs() <= proposed.slack / 2).all()
        assert (proposed.closeness.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (1e30, 0.0), (1e-30, 0.0), (1.0, 1e4)])
def test_ordinary_rows_need_no_second_search(factor: float, offset: float, engine: str) -> None:
    rows, queries = clusters(2000, 64, 0.3) * factor, clusters(300, 64, 0.3) * factor
    searched = Index(Rows.of(rows + offset))
    proposed = searched._proposed(CPU).propose(queries + offset, 10)
    assert proposed.doubtful.double().mean() < 0.05


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_exact_when_torch_multiplies_in_low_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "faiss_module", lambda: None)
    rows, queries = random(300, 64), random(20, 64, 2)
    searched = Index(Rows.of(rows))
    slack = searched._proposed(CPU).propose(queries, 5).slack
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert (searched._proposed(CPU).propose(queries, 5).slack > 1000 * slack).all()
        values = searched.search(queries, 5)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.allclose(values, brute(rows, queries, "l2", False)[:, :5], rtol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_gradient(metric: index.Metric, normalized: bool) -> None:
    searched = Index(Rows.of(random(50, 4)), metric, normalized=normalized)
    queries = random(6, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: searched.search(q, 5)[0], queries)
    assert torch.autograd.gradcheck(lambda q: searched.kth(q, 5), queries)
    values = searched.search(queries, 5)[0]
    assert values.requires_grad
    values.sum().backward()
    assert queries.grad is not None


def test_the_gradient_at_a_row_itself_is_finite() -> None:
    rows = random(20, 4)
    queries = rows[:2].clone().requires_grad_()
    Index(Rows.of(rows)).kth(queries, 1).sum().backward()
    assert queries.grad is not None
    assert bool(torch.isfinite(queries.grad).all())


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW16", "PCA8,Flat", "SQ8"])
def test_approximate_indexes(factory: str) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra")
    rows, queries = random(600, 16), random(50, 16, 1)
    expected = brute(rows, queries, "l2", False)[:, :5]
    values, found = Index(Rows.of(rows), factory=factory).search(queries, 5)
    true = (queries[:, None] - rows[found]).norm(dim=2)
    assert torch.allclose(values, true, rtol=1e-12)
    assert (values >= expected - 1e-12).all()
    recall = float((values <= expected[:, -1:] * (1 + 1e-12)).double().mean())
    assert recall > (0.2 if "PCA" in factory else 0.95)


def test_an_approximate_index_that_finds_too_few_is_searched_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra")
    monkeypatch.setattr(search, "EFFORT", {"nprobe": 1})
    rows, queries = clusters(90, 8, 0.01), clusters(9, 8, 0.01)
    values = Index(Rows.of(rows), factory="IVF3,Flat").search(queries, 60)[0]
    assert torch.allclose(values, brute(rows, queries, "l2", False)[:, :60], rtol=1e-9)


@pytest.mark.parametrize(
    "factory",
    [
        "Flatt",
        "",
        "IVF0,Flat",
        "IVF9999999999,Flat",
        "HNSW0",
        "HNSW1",
        "IVF2_HNSW1,Flat",
        "RR999999999,Flat",
        "Pad999999999,Flat",
        "HNSW" + "9" * 5000,
    ],
)
def test_an_unknown_factory(factory: str) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra")
    with pytest.raises(ConfigurationError, match="knows no index"):
        Index(Rows.of(random(10, 4)), factory=factory).search(random(1, 4), 1)


def test_too_few_rows_to_build_an_approximate_index() -> None:
    pytest.importorskip("faiss", reason="faiss is an extra")
    with pytest.raises(ConfigurationError, match="cannot be built from 10 rows"):
        Index(Rows.of(random(10, 4)), factory="IVF64,Flat").search(random(1, 4), 1)


def test_other_factories_need_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "faiss_module", lambda: None)
    with pytest.raises(ConfigurationError, match=r"needs faiss: pip install 'oodcore\[cpu\]'"):
        Index(Rows.of(random(10, 4)), factory="HNSW16").search(random(1, 4), 1)


def test_what_cannot_be_searched() -> None:
    with pytest.raises(DataError, match=r"takes rows \[D\]"):
        Index(Rows((2, 3)))
    empty = Index(Rows((4,)))
    assert len(empty) == 0
    with pytest.raises(DataError, match="1 neighbours were asked for, and the index has 0 rows"):
        empty.search(random(1, 4), 1)
    searched = Index(Rows.of(random(5, 4)))
    for k in (0, 6):
        with pytest.raises(DataError, match=f"{k} neighbours"):
            searched.kth(random(1, 4), k)
    with pytest.raises(DataError, match=r"queries must be \[N, 4\], not \[2, 3\]"):
        searched.search(random(2, 3), 1)
    values, found = searched.search(random(0, 4), 2)
    assert values.shape == found.shape == (0, 2)
    assert searched.kth(random(0, 4), 2).shape == (0,)


def test_nothing_given_is_changed() -> None:
    rows, queries = random(30, 4), random(5, 4, 1)
    copies = rows.clone(), queries.clone()
    Index(Rows.of(rows), normalized=True).search(queries, 3)
    assert torch.equal(rows, copies[0])
    assert torch.equal(queries, copies[1])


def test_the_setting_of_faiss_is_put_back() -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is an extra")
    searched = Index(Rows.of(random(30, 4)))
    proposer = searched._proposed(CPU)
    engine, seen = proposer.engine, []

    class Recorder:
        def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
            seen.append(faiss.cvar.distance_compute_blas_threshold)
            if len(seen) == 1:
                searched.search(random(5, 4, 1), 3)
            return engine.search(queries, count)  # type: ignore[no-any-return]

    proposer.engine = Recorder()
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 777
    try:
        searched.search(random(5, 4, 1), 3)
        assert seen == [20, 20]
        assert faiss.cvar.distance_compute_blas_threshold == 777
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def test_an_index_can_be_pickled() -> None:
    searched = Index(Rows.of(random(30, 4)), normalized=True)
    size = len(pickle.dumps(searched))
    queries = random(5, 4, 1)
    before = searched.search(queries, 3)
    assert len(pickle.dumps(searched)) == size, "what can be built again is pickled"
    again = pickle.loads(pickle.dumps(searched)).search(queries, 3)
    assert torch.equal(before[0], again[0])
    assert torch.equal(before[1], again[1])


# Rows
