"""bench/loader.py compares like with like: both pipelines' views have the same statistics."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mopro_fast.ops.colour import normalize

if sys.platform != "linux":
    pytest.skip("DALI is for Linux", allow_module_level=True)


@pytest.mark.medium
def test_official_views_have_the_statistics_of_ours(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import loader

    rng = np.random.default_rng(0)
    for i in range(64):
        blocks = Image.fromarray(rng.integers(20, 220, (6, 8, 3), dtype=np.uint8))
        blocks.resize((120, 90), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg")
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/{i}.jpg {i}\n" for i in range(64)))
    theirs = loader.official(str(tmp_path / "list.txt"), 48, 0, 64, loader.OFFICIAL)
    ours = loader.ours(str(tmp_path / "list.txt"), 48, 2, 64, torch.device("cpu"))
    values = []
    for _ in range(12):
        q, k, *_ = next(theirs)
        batch = next(ours)
        pairs = (q, normalize(batch.view_q)), (k, normalize(batch.view_k))
        values.append([[statistics(x) for x in pair] for pair in pairs])
    (q, our_q), (k, our_k) = np.mean(values, axis=0)
    np.testing.assert_allclose(q, our_q, rtol=0.03, atol=0.03)
    np.testing.assert_allclose(k, our_k, rtol=0.06, atol=0.06)
    assert abs(q - k).max() > 0.05  # the colours have changed


def statistics(x: torch.Tensor) -> list[float]:
    """Contrast within images, difference of neighbours, saturation, and the spread of the images' brightness."""
    rows = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
    saturation = (x.amax(1) - x.amin(1)).mean()
    return [x.mean(), x.std(dim=(2, 3)).mean(), rows, saturation, x.mean(dim=(1, 2, 3)).std()]
