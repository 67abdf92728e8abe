"""Every number that a script takes has bounds, declared with its flag, and what lies beyond them ends the program."""

import dataclasses
import json
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.repo import REPO, Run
from helpers.script_files import SCRIPTS, load_script

from bge_accel.config import Bounds, parse_config

# Beyond the bounds of every number of the scripts that people run: (flag, values that are refused, what is said).
POSITIVE, NOT_NEGATIVE, SHARE = "at least 1", "at least 0", "between 0 and 1"
SEED = (["-1", "4294967296"], "between 0 and 4294967295")
BEYOND = {
    "scripts/finetune.py": {
        "train_group_size": (["0", "-8", "10001"], "between 1 and 10000"),
        "query_max_len": (["0", "-1"], POSITIVE),
        "passage_max_len": (["0", "-1"], POSITIVE),
        "max_example_num_per_dataset": (["0", "-1"], POSITIVE),
        "shuffle_ratio": (["5", "-0.1"], SHARE),
        "pad_to_multiple_of": (["0", "-8"], "between 1 and 4096, or left out"),
        "small_threshold": (["-1"], NOT_NEGATIVE),
        "drop_threshold": (["-1"], NOT_NEGATIVE),
        "sampling_temperature": (["0", "-1"], "above 0"),
        "shuffle_buffer_size": (["0", "-1"], POSITIVE),
        "temperature": (["0", "-0.02", "-1e-5"], "above 0"),
        "learning_rate": (["-1e-5", "0", "2"], "above 0, and at most 1"),
        "num_train_epochs": (["0", "-3", "1e7"], "above 0, and at most 1000000"),
        "max_steps": (["-2"], "at least -1"),
        "per_device_train_batch_size": (["0", "-1", "1000001"], "between 1 and 1000000"),
        "gradient_accumulation_steps": (["0", "-1"], "between 1 and 1000000"),
        "warmup_ratio": (["-0.1", "1.5"], SHARE),
        "warmup_steps": (["-1"], NOT_NEGATIVE),
        "weight_decay": (["-1", "1.5"], SHARE),
        "adam_beta1": (["1.5", "1", "-0.1"], "at least 0, and below 1"),
        "adam_beta2": (["1.5", "1", "-0.1"], "at least 0, and below 1"),
        "adam_epsilon": (["-1", "0", "-1e-8"], "above 0, and at most 1"),
        "max_grad_norm": (["-1"], NOT_NEGATIVE),
        "seed": SEED,
        "eval_steps": (["0"], POSITIVE),
        "early_stopping_patience": (["0"], "at least 1, or left out"),
        "max_tokens_per_micro_batch": (["0"], "at least 1, or left out"),
        "activation_memory_budget": (["-1"], "at least 0, or left out"),
        "save_steps": (["0", "-1"], POSITIVE),
        "save_total_limit": (["0", "-1"], "at least 1, or left out"),
        "logging_steps": (["0", "-1"], POSITIVE),
    },
    "scripts/doctor.py": {
        "sample_rows": (["0"], POSITIVE),
        "measure_steps": (["-1"], NOT_NEGATIVE),
        "num_processes": (["0"], "between 1 and 1000000, or left out"),
    },
    "scripts/demo.py": {
        "seeds": SEED,
        "max_steps": (["0"], POSITIVE),
        "batch_size": (["0"], POSITIVE),
        "max_length": (["0", "7"], "at least 8"),
        "learning_rate": (["-1e-4", "2"], "above 0, and at most 1"),
        "temperature": (["0"], "above 0"),
        "merge_weight": (["-0.5", "1.5"], SHARE),
    },
    "scripts/encode_corpus.py": {
        "max_length": (["0"], "at least 1, or left out"),
        "max_tokens_per_micro_batch": (["0"], "at least 1, or left out"),
        "batch_size": (["0"], "at least 1, or left out"),
        "shard_size": (["0", "-1"], "at least 1, or left out"),
    },
    "scripts/evaluate_retrieval.py": {
        "k": (["0"], POSITIVE),
        "cutoffs": (["0", "-10"], "at least 1, or left out"),
        "num_processes": (["0", "1025"], "between 1 and 1024, or left out"),
        "max_query_length": (["0"], POSITIVE),
        "max_passage_length": (["0"], POSITIVE),
        "batch_size": (["0"], POSITIVE),
        "show": (["-1"], NOT_NEGATIVE),
    },
    "scripts/mine_hard_negatives.py": {
        "max_length": (["0"], POSITIVE),
        "embedder_query_max_length": (["0"], "at least 1, or left out"),
        "embedder_passage_max_length": (["0"], "at least 1, or left out"),
        "batch_size": (["0"], "at least 1, or left out"),
        "negative_number": (["0"], POSITIVE),
        "seed": SEED,
        "absolute_margin": (["-1e-3"], "at least 0, or left out"),
        "relative_margin": (["-0.05", "5"], "between 0 and 1, or left out"),
        "max_positive_overlap": (["0", "1.1"], "above 0, and at most 1"),
        "search_batch_size": (["0"], POSITIVE),
        "reranker_max_length": (["0", "15"], "at least 16"),
        "reranker_query_max_length": (["0"], "at least 1, or left out"),
        "reranker_batch_size": (["0"], "at least 1, or left out"),
        "show": (["-1"], NOT_NEGATIVE),
        "max_score": ([], ""),
        "min_score": ([], ""),
    },
    "scripts/score_with_reranker.py": {
        "reranker_max_length": (["0", "15"], "at least 16"),
        "reranker_query_max_length": (["0"], "at least 1, or left out"),
        "reranker_batch_size": (["0"], "at least 1, or left out"),
    },
    "scripts/mix_models.py": {
        "last_checkpoints": (["0"], "at least 1, or left out"),
        "temperature": (["0", "-5"], "above 0"),
        "batch_size": (["0"], POSITIVE),
        "max_input_length": (["0"], POSITIVE),
        "neg_number": (["-1"], NOT_NEGATIVE),
        "seed": SEED,
        "search_steps": (["0", "1001"], "between 1 and 1000"),
        "max_drop": (["-0.01"], NOT_NEGATIVE),
        "weights": ([], ""),
    },
    "data/split_rows.py": {"held_out": (["0"], POSITIVE), "seed": SEED},
}


def numbers_of(script: str) -> Iterator[tuple[dataclasses.Field, type]]:
    """The fields of a script's own settings that are a number or a list of numbers."""
    config = load_script(REPO / script).Config
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        kinds |= {inner for kind in list(kinds) for inner in typing.get_args(kind)}
        if number := kinds & {int, float}:
            yield field, number.pop()


WITH_SETTINGS = sorted(
    str(path.relative_to(REPO)) for path in SCRIPTS if "parse_config(" in path.read_text(encoding="utf-8")
)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> typing.Callable[..., str]:
    """Parses a script's settings, demands status 2 and one line, and returns that."""

    def says(script: str, *argv: str, yaml: str = "") -> str:
        module = load_script(REPO / script)
        (tmp_path / "run.yaml").write_text(yaml)
        with pytest.raises(SystemExit) as stop:
            parse_config(
                module.Config,
                ["--config", str(tmp_path / "run.yaml"), *argv],
                refused=getattr(module, "REFUSED", None),
            )
        out, err = capsys.readouterr()
        message, hint = err.splitlines()
        assert stop.value.code == 2 and not out and "--help" in hint
        return message.split(": error: ", 1)[1]

    return says


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_every_number_has_bounds_and_its_default_lies_within(script: str) -> None:
    for field, _ in numbers_of(script):
        bounds: Bounds = field.metadata["bounds"]
        assert bounds.at_least is not None or bounds.above is not None, f"{script} --{field.name} has no bound"
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for number in default if isinstance(default, list) else [default]:
            assert number is None or bounds.allow(number), f"{script} --{field.name}"


@pytest.mark.parametrize("script", BEYOND)
def test_the_table_names_every_number(script: str) -> None:
    inherited = set(BEYOND["scripts/finetune.py"]) if script == "scripts/doctor.py" else set()
    assert {field.name for field, _ in numbers_of(script)} == set(BEYOND[script]) | inherited


@pytest.mark.parametrize(
    ("script", "flag", "value", "bound"),
    [
        (script, flag, value, bound)
        for script, flags in BEYOND.items()
        for flag, (values, bound) in flags.items()
        for value in values
    ],
)
def test_what_lies_beyond_is_refused(says, script: str, flag: str, value: str, bound: str) -> None:
    shown = {"-1e-5": "-1e-05", "-1e-8": "-1e-08", "1e7": "10000000", "-1e-3": "-0.001", "-1e-4": "-0.0001"}
    said = f"{flag} is {shown.get(value, value)}: it has to be {bound}"
    assert says(script, f"--{flag}", value) == says(script, f"--{flag}={value}") == f"--{said}"
    assert says(script, yaml=f"{flag}: {value}").endswith(f"run.yaml: {said}")
    kind = {field.name: str(field.type) for field, _ in numbers_of(script)}[flag]
    if kind.startswith("list"):
        assert says(script, f"--{flag}", "1", value, "2") == f"--{said}"
        assert says(script, yaml=f"{flag}: [1, {value}]").endswith(f"run.yaml: {said}")


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_what_is_no_finite_number_is_refused(says, script: str) -> None:
    for field, kind in numbers_of(script):
        for value in ("nan", "inf", "-inf", "-1e999", "1" + 400 * "0"):
            refused = "is not an integer" if kind is int else "is not a number"
            said = says(script, f"--{field.name}", value)
            assert field.name in said and (refused in said or said.endswith("is too large"))
        for value in (".nan", ".inf", "-.inf"):
            assert f"run.yaml: {field.name}: " in says(script, yaml=f"{field.name}: {value}")
        if kind is int:
            assert says(script, f"--{field.name}", "1000000000000001").endswith("is too large")


@pytest.mark.parametrize(
    ("script", "flag", "value", "expected"),
    [
        ("scripts/mine_hard_negatives.py", "min_score", "-1e-3", -1e-3),
        ("scripts/mine_hard_negatives.py", "max_score", "-.5", -0.5),
        ("scripts/mine_hard_negatives.py", "range_for_sampling", "-5-10", "-5-10"),
        ("scripts/mine_hard_negatives.py", "query_instruction_for_retrieval", "-", "-"),
        ("scripts/mine_hard_negatives.py", "query_instruction_for_retrieval", "-x", "-x"),
        ("scripts/mix_models.py", "weights", "-1e-1", [-0.1]),
        ("scripts/finetune.py", "adam_beta1", "0", 0.0),
        ("scripts/finetune.py", "max_grad_norm", "0", 0.0),
        ("scripts/finetune.py", "seed", "4294967295", 2**32 - 1),
    ],
)
def test_values_at_the_bounds_and_with_a_minus_are_taken(script: str, flag: str, value: str, expected: object) -> None:
    config = load_script(REPO / script).Config
    needed = [
        part
        for field in dataclasses.fields(config)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for part in (f"--{field.name}", "x")
    ]
    assert getattr(parse_config(config, [*needed, f"--{flag}", value]), flag) == expected


@pytest.mark.parametrize(
    ("script", "flag", "args"),
    [
        ("finetune.py", "query_max_len", "--train_data rows.jsonl --output_dir out"),
        ("finetune.py", "passage_max_len", "--train_data rows.jsonl --output_dir out"),
        ("mine_hard_negatives.py", "max_length", "--input_file rows.jsonl --output_file out --range_for_sampling 0-1"),
        (
            "mine_hard_negatives.py",
            "embedder_query_max_length",
            "--input_file rows.jsonl --output_file out --range_for_sampling 0-1",
        ),
        ("encode_corpus.py", "max_length", "--corpus_data corpus.jsonl --output_dir out"),
        ("evaluate_retrieval.py", "max_query_length", "--corpus_data corpus.jsonl --query_data queries.jsonl --k 1"),
        ("evaluate_retrieval.py", "max_passage_length", "--corpus_data corpus.jsonl --query_data queries.jsonl --k 1"),
        ("mix_models.py", "max_input_length", "--example_data rows.jsonl --output_path out"),
        ("mix_models.py", "max_input_length", "--search --dev_data rows.jsonl --output_path out"),
    ],
)
def test_a_length_that_leaves_special_tokens_alone_is_refused_before_weights_are_loaded(
    tmp_path: Path, tiny_model: str, run_script: Run, script: str, flag: str, args: str
) -> None:
    row = {"query": "who", "pos": ["king"], "neg": ["list"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "corpus.jsonl").write_text('{"text": "king"}')
    (tmp_path / "queries.jsonl").write_text('{"query": "who", "positive": ["king"]}')
    model = shutil.copytree(tiny_model, tmp_path / "model")
    models: tuple[object, ...] = ("--model_name_or_path", model)
    if script == "evaluate_retrieval.py":
        models = ("--encoder", model)
    if script == "mix_models.py":
        models = ("--model_names_or_paths", model, tiny_model)
    else:
        (model / "model.safetensors").write_bytes(b"no weights")
    done = run_script(script, *models, *args.split(), f"--{flag}", 2, status=2)
    assert (
        f"{flag} is 2: the model's tokenizer puts 2 special tokens into each text, so it has to be at least 3"
        in (done.stderr.splitlines()[-1])
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


RUN = "--train_data rows.jsonl --output_dir out"
MINE = "--input_file rows.jsonl --output_file out --range_for_sampling 0-1"
EVALUATE = "--corpus_data corpus.jsonl --query_data queries.jsonl --k 1"


@pytest.mark.parametrize(
    ("script", "kind", "flag", "args"),
    [
        ("finetune.py", "query", "query_max_len", RUN),
        ("finetune.py", "passage", "passage_max_len", RUN),
        ("mine_hard_negatives.py", "query", "max_length", MINE),
        ("mine_hard_negatives.py", "passage", "embedder_passage_max_length", MINE),
        ("encode_corpus.py", "passage", "max_length", "--corpus_data corpus.jsonl --output_dir out"),
        ("evaluate_retrieval.py", "query", "max_query_length", EVALUATE),
        ("evaluate_retrieval.py", "passage", "max_passage_length", EVALUATE),
    ],
)
def test_an_instruction_that_fills_the_length_is_refused_before_weights_are_loaded(
    tmp_path: Path, tiny_model: str, run_script: Run, script: str, kind: str, flag: str, args: str
) -> None:
    """Every text would be the instruction alone."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "who", "pos": ["king"], "neg": ["list"]}))
    (tmp_path / "corpus.jsonl").write_text('{"text": "king"}')
    (tmp_path / "queries.jsonl").write_text('{"query": "who", "positive": ["king"]}')
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    models = ("--encoder" if script == "evaluate_retrieval.py" else "--model_name_or_path", model)
    instruction = (f"--{kind}_instruction_for_retrieval", "the king is in the story: ")
    done = run_script(script, *models, *args.split(), *instruction, f"--{flag}", 8, status=2)
    assert f'{flag} is 8: the {kind} instruction "the king is in the story: " fills it' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "flag", "args"),
    [
        ("finetune.py", "query_max_len", RUN),
        ("finetune.py", "query_max_len", f"{RUN} --streaming --max_steps 2 --save_strategy no"),
        ("mine_hard_negatives.py", "max_length", MINE),
        ("mine_hard_negatives.py", "embedder_query_max_length", MINE),
    ],
)
def test_a_rows_own_prompt_that_fills_the_length_is_refused(
    tmp_path: Path, tiny_model: str, run_script: Run, script: str, flag: str, args: str
) -> None:
    """Its query would be the prompt alone; the rows before have none, a short one, and an empty one."""
    prompts: list[str | None] = [None, "the ", "", "the king is in the story: ", "the "]
    rows = [{"query": f"who {i}", "pos": ["king"], "neg": ["list"], "prompt": own} for i, own in enumerate(prompts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    if script == "finetune.py" and "--streaming" not in args:
        (model / "model.safetensors").write_bytes(b"no weights")
    done = run_script(script, "--model_name_or_path", model, *args.split(), f"--{flag}", 8, status=2)
    expected = f'rows.jsonl:4: --{flag} is 8: the query instruction "the king is in the story: " fills it'
    assert expected in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out.mining").exists() and not (tmp_path / "out" / "model.safetensors").exists()


def test_what_may_be_left_out_is_not_empty(says: typing.Callable[..., str]) -> None:
    """As a variable of the shell that is not set is: the default would be taken without a word."""
    for script in WITH_SETTINGS:
        config = load_script(REPO / script).Config
        for field in dataclasses.fields(config):
            is_text = typing.get_type_hints(config)[field.name] == str | None and not field.metadata["choices"]
            if is_text and "instruction" not in field.name:
                expected = f"{field.name} is empty: give it a value, or leave it out"
                assert expected in says(script, f"--{field.name}", "")
                assert expected in says(script, yaml=f'{field.name}: ""')
