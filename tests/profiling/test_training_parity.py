"""Training here is training with `peft` and torch: loss curve and adapter after 20 AdamW steps, alone and jointly."""

import numpy as np
import pytest

from profiling.bench import parity

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library)
    return parity.compare(["answers", "titles"], tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("side", [0, 1], ids=["alone", "jointly with five others"])
@pytest.mark.parametrize("task", ["answers", "titles"], ids=["LoRA", "DoRA"])
def test_loss_curve_and_adapter_are_those_of_peft(compared, side, task):
    found = compared[side][task]
    assert found.loss < TOLERANCE
    assert found.adapter < TOLERANCE


def test_the_comparison_can_fail():
    def adapter(value):
        return {"0": {"q": {"a": np.full((2, 2), value), "b": np.full((2, 2), value)}}}

    losses = np.ones(3)
    found = parity.difference((losses, adapter(2.001)), (losses, adapter(2.0)), adapter(1.0))
    assert found.adapter == pytest.approx(1e-3)
    assert parity.difference((1.01 * losses, adapter(2.0)), (losses, adapter(2.0)), adapter(1.0)).loss > 0.009
