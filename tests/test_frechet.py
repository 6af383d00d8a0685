"""The Fréchet distance against closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.__main__ import main
from eval.frechet import distance, moments, root, table

ROOT = Path(__file__).parent.parent


def gaussian(mean: list[float], covariance: list[list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).double(), torch.tensor(covariance).double()


def rotation(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double())[0]


def test_independent_features() -> None:
    """The distance is |m - m'|^2 + the sum of (s - s')^2 over standard deviations, in every orthonormal basis."""
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, 6)), rng.uniform(0, 3, (2, 6))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    a, b = ((torch.from_numpy(m), torch.from_numpy(s**2).diag()) for m, s in zip(means, deviations, strict=True))
    assert distance(a, b) == pytest.approx(expected, rel=1e-12)
    q = rotation(1, 6)
    turned = [(q @ mean, q @ covariance @ q.T) for mean, covariance in (a, b)]
    assert distance(*turned) == pytest.approx(expected, rel=1e-9)


def test_dependent_features() -> None:
    """The two 2 x 2 covariances do not commute. The trace of the square root of M is (tr M + 2 det(M)^1/2)^1/2."""
    a, b = gaussian([0, 0], [[2, 1], [1, 3]]), gaussian([1, 2], [[5, -2], [-2, 1]])
    product = a[1] @ b[1]
    cross = (torch.trace(product) + 2 * torch.det(product).sqrt()).sqrt()
    expected = 5 + torch.trace(a[1]) + torch.trace(b[1]) - 2 * cross
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-12)
    assert distance(b, a) == pytest.approx(float(expected), rel=1e-12)


def test_fewer_pictures_than_features() -> None:
    """The covariances are singular. The distance to itself is 0, and a shift adds its squared length."""
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-6)
    assert distance(moments(x), moments(x + 2)) == pytest.approx(4 * 20, abs=1e-4)


def test_moments_are_numpy_s() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    mean, covariance = moments(x)
    np.testing.assert_allclose(mean, x.double().mean(dim=0))
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)
    assert covariance.dtype == torch.float64
    np.testing.assert_allclose(root(covariance) @ root(covariance), covariance, atol=1e-12)


def test_the_frechet_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frechet.json"
    command = ["eval", "--weights", str(ROOT / "weights"), "frechet", "--steps", "1", "--out", str(out), "--n"]
    monkeypatch.setattr("sys.argv", [*command, "6"])
    main()
    results = json.loads(out.read_text())
    actual = results["distance"]
    assert list(actual) == ["another", "reconstructed", "drawn"] and 0 < actual["reconstructed"] < actual["drawn"]
    assert table(results) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "1"])
    with pytest.raises(SystemExit, match="at least 2 pictures"):
        main()
