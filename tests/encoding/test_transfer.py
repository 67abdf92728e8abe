"""Nothing in a step waits for a GPU but the line of the log."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import build, padded
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.encoding.transfer import encoder_inputs, to_device, to_host
from bge_accel.kernels import packed as unpadded
from bge_accel.models.encoder import Encoder
from bge_accel.models.pooling import POOLING

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", [*unpadded.MODEL_TYPES, "electra"])
@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[5, 1, 12, 3], [4, 4]])
def test_embeddings_are_those_of_a_plain_mask(family, pooling, side, lengths):
    encoder = Encoder(build(family), pooling, normalize=False)
    batch = padded(lengths, encoder.config, side)
    inputs = encoder_inputs(batch, CPU)
    assert inputs["is_padded"] == (len(set(lengths)) > 1)
    torch.testing.assert_close(encoder(**inputs), encoder(**batch), atol=1e-12, rtol=0)


def test_the_model_is_not_asked_whether_there_is_padding():
    """transformers' own question is answered by the mask's form."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.extend(["_local_scalar_dense"] * ("_local_scalar_dense" in str(func)))
            return func(*args, **(kwargs or {}))

    encoder = Encoder(build("bert"), "cls", normalize=True)
    batch = padded([5, 2], encoder.config)
    with Watch():
        encoder(**encoder_inputs(batch, CPU))
        assert not asked
        encoder(**batch)
    assert asked, "transformers no longer asks: is_padded can go"


def test_the_way_there_and_back():
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    assert to_device(tensor, CPU) is tensor
    assert (to_host(tensor)() == [[0, 1, 2], [3, 4, 5]]).all() and to_host(tensor.sum())().item() == 15


@pytest.mark.parametrize("tiles", [False, True])
def test_no_step_waits_but_the_one_that_is_logged(tiny_model: str, tmp_path: Path, tiles: bool) -> None:
    """As many numbers are asked for in 9 steps as in 3: the log's. Known positives are met and masked."""
    rows = [{"query": f"king {i % 5}", "pos": [f"the story of {i % 5}"], "neg": [f"a list {i}"]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spies = [REPO / "tests" / "helpers" / "spy_waits.py"]
    if tiles:  # a loss in tiles, as large batches have it
        small = tmp_path / "small_tiles.py"
        small.write_text(
            "import functools, os, runpy, sys\nimport bge_accel.training.losses as losses\n"
            "losses.contrastive_loss = functools.partial(losses.contrastive_loss, max_scores=50)\n"
            "sys.argv = sys.argv[1:]\nsys.path[0] = os.path.dirname(sys.argv[0])\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        spies.append(small)
    numbers = []
    for steps in (3, 9):
        args = ["--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--output_dir", f"out-{steps}"]
        args += ["--optim", "adamw_torch_fused", "--logging_steps", "100", "--save_strategy", "no"]
        args += ["--per_device_train_batch_size", "8", "--train_group_size", "2", "--max_steps", str(steps)]
        Job(*args, cwd=tmp_path, through=spies, env={"SPY_WAITS": str(tmp_path / "waits")}).ends()
        log = (tmp_path / f"out-{steps}" / "train_log.jsonl").read_text().splitlines()
        assert len(log) == 1 and json.loads(log[0])["masked_per_query"] > 0
        numbers.append(int((tmp_path / "waits").read_text()))
    assert numbers[0] == numbers[1] < 10, numbers
