"""Settings from YAML and command line, and an answer to every flag that people know from other tools."""

import dataclasses
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from helpers.repo import REPO, Run

from bge_accel.config import (
    Refusal,
    check_model_path,
    check_rules,
    learning_settings,
    option,
    options_from,
    parse_config,
    required,
    shown_in_card,
    to_yaml,
    user_errors,
    without_secrets,
)
from bge_accel.files.parsing import load_yaml
from bge_accel.training.refused_flags import REFUSED

FINETUNE = REPO / "scripts" / "finetune.py"
NEEDED = ["--train_data", "a.jsonl", "--output_dir", "out"]


@dataclass(kw_only=True)
class Config:
    train_data: list[str] = required("rows")
    output_dir: str = required("folder")
    learning_rate: float = option(2e-5, "half of it after 50% of the steps")
    max_steps: int = option(10, "steps")
    bf16: bool = option(False, "precision")
    mask_false_negatives: bool = option(True, "mask")
    normalize_embeddings: bool | None = option(None, "scale", aliases=["normalized", "norm_it"])
    pooling: Literal["cls", "mean"] | None = option(None, "pooling")
    save_strategy: Literal["steps", "no"] = option("steps", "when")
    max_tokens: int | None = option(512, "tokens")
    cutoffs: list[int] = option([1, 10], "cutoffs")
    run_name: str | None = option(None, "name")


REFUSALS = {
    "deepspeed": Refusal("say so to `accelerate launch`"),
    "eval_strategy": Refusal("use scripts/evaluate.py", ("no", "False")),
    "do_train": Refusal("it trains", ("True",)),
}


@pytest.fixture
def parse(tmp_path):
    def parse(*argv, yaml=None, config_class=Config, needed=NEEDED, refused=REFUSALS):
        if yaml is not None:
            path = tmp_path / "run.yaml"
            path.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
            argv = ("--config", str(path), *argv)
        return parse_config(config_class, [*needed, *argv], refused=refused)

    return parse


@pytest.fixture
def fails(parse, capsys):
    """Parses, demands status 2 and one line (with a hint at --help), returns that line."""

    def fails(*argv, **kwargs):
        with pytest.raises(SystemExit) as stop:
            parse(*argv, **kwargs)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out
        message, hint = err.splitlines()
        assert ": error: " in message and "--help" in hint
        return message.split(": error: ", 1)[1]

    return fails


@pytest.fixture(scope="module")
def finetune_config():
    spec = importlib.util.spec_from_file_location("finetune_under_test", FINETUNE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Config


def flags_of(config_class):
    return {name for f in dataclasses.fields(config_class) for name in (f.name, *f.metadata["aliases"])}


# ---- values


def test_command_line_wins_over_yaml_wins_over_defaults(parse):
    cfg = parse("--max_steps", "3", yaml="max_steps: 2\nlearning_rate: 0.5\ncutoffs: [4]")
    assert (cfg.max_steps, cfg.learning_rate, cfg.cutoffs, cfg.max_tokens) == (3, 0.5, [4], 512)
    assert parse().cutoffs == [1, 10] and parse().cutoffs is not parse().cutoffs


def test_required_may_come_from_yaml_and_are_overridden(parse):
    cfg = parse("--output_dir", "b", yaml="train_data: [x, y]\noutput_dir: a", needed=[])
    assert (cfg.train_data, cfg.output_dir) == (["x", "y"], "b")


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", "3", 3.0),
        ("max_steps", "-1", -1),
        ("max_tokens", "None", None),
        ("pooling", "mean", "mean"),
        ("pooling", "None", None),
        ("save_strategy", "steps", "steps"),
        ("normalize_embeddings", "None", None),
        ("normalized", "False", False),
        ("norm-it", "True", True),
        ("learning-rate", "0.1", 0.1),
        ("run_name", "检索 {}: x", "检索 {}: x"),
        ("cutoffs", "5", [5]),
        ("train_data", "x", ["x"]),
    ],
)
def test_the_same_text_means_the_same_in_yaml_and_on_the_command_line(parse, field, text, value):
    name = {"normalized": "normalize_embeddings", "norm-it": "normalize_embeddings"}.get(field, field.replace("-", "_"))
    needed = [] if field == "train_data" else NEEDED
    quoted = f"'{text}'" if field == "run_name" else text
    from_line = parse(f"--{field}", text, needed=[*needed, "--output_dir", "o"])
    from_yaml = parse(yaml=f"{field}: {quoted}", needed=[*needed, "--output_dir", "o"])
    for cfg in (from_line, from_yaml):
        assert getattr(cfg, name) == value and type(getattr(cfg, name)) is type(value)


def test_save_strategy_no_needs_no_quotes_in_yaml(parse):
    assert parse("--save_strategy", "no").save_strategy == "no"
    assert parse(yaml="save_strategy: 'no'").save_strategy == "no"
    assert parse(yaml="save_strategy: no").save_strategy == "no"  # which YAML reads as False


def test_lists_take_several_values(parse):
    cfg = parse("--cutoffs", "1", "2", "3", "--train_data", "a", "b", needed=["--output_dir", "o"])
    assert (cfg.cutoffs, cfg.train_data) == ([1, 2, 3], ["a", "b"])


def test_yaml_null_unsets_an_optional_value(parse):
    assert parse(yaml="max_tokens: null").max_tokens is None and parse(yaml="max_tokens:").max_tokens is None


@pytest.mark.parametrize("field", ["bf16", "mask_false_negatives", "normalize_embeddings", "normalized"])
@pytest.mark.parametrize(
    ("spelling", "expected"),
    [("{}", True)]
    + [("{} " + word, True) for word in ("True", "true", "yes", "1")]
    + [("{} " + word, False) for word in ("False", "false", "no", "0")]
    + [("{}=True", True), ("{}=False", False), ("no_{}", False), ("{} --no_{}", False)],
)
def test_booleans_in_every_spelling(parse, field, spelling, expected):
    name = "normalize_embeddings" if field == "normalized" else field
    opposite = f"{field}: {not expected}"
    line = "--" + spelling.format(field, field)
    for argv in (line.split(), line.replace("_", "-").split()):
        assert getattr(parse(*argv, yaml=opposite), name) is expected


@pytest.mark.parametrize(("word", "expected"), [("true", True), ("yes", True), ("'True'", True), ("off", False)])
def test_booleans_in_yaml(parse, word, expected):
    assert parse("--bf16", str(not expected), yaml="").bf16 is not expected
    assert parse(yaml=f"bf16: {word}").bf16 is expected


def test_to_yaml_is_read_back_unchanged(parse, tmp_path):
    cfg = Config(
        train_data=["no", "1e-5", "null", "路径/a b.jsonl", "12", ""],
        output_dir="- {}{}\n: #",
        learning_rate=1e-5,
        normalize_embeddings=False,
        save_strategy="no",
        max_tokens=None,
        cutoffs=[],
        run_name="True",
    )
    text = to_yaml(cfg)
    assert parse(yaml=text, needed=[]) == cfg
    assert "路径" in text and text.index("train_data") < text.index("run_name")
    for rate in (1e-8, 3e-05, 1e20, 0.1):
        assert parse(yaml=to_yaml(dataclasses.replace(cfg, learning_rate=rate)), needed=[]).learning_rate == rate


# ---- mistakes


@pytest.mark.parametrize(
    ("field", "line", "yaml", "message"),
    [
        ("learning_rat", "1", "1", "unknown .*learning_rat.*; did you mean DASHESlearning_rate\\?$"),
        ("deepsped", "1", "1", "did you mean DASHESdeepspeed\\?$"),
        ("normalised", "1", "1", "did you mean DASHESnormalized\\?$"),
        ("zzzzzzz", "1", "1", "unknown (argument|key) \\S*zzzzzzz'?$"),
        ("learning", "1", "1", "unknown .*learning'?;"),  # no abbreviation
        ("max_steps", "many", "many", "'many' is not an integer"),
        ("max_steps", "1.5", "1.5", "1.5'? is not an integer"),
        ("max_steps", "1e3x", "[1]", "is not an integer"),
        ("max_steps", "True", "true", "True'? is not an integer"),
        ("max_steps", "None", "null", "None'? is not an integer"),
        ("learning_rate", "fast", "fast", "'fast' is not a number"),
        ("learning_rate", "nan", ".nan", "nan'? is not a number"),
        ("learning_rate", "inf", ".inf", "inf'? is not a number"),
        ("learning_rate", "yes", "yes", "is not a number"),
        ("bf16", "maybe", "maybe", "'maybe' is not True or False"),
        ("bf16", "None", "null", "is not True or False"),
        ("bf16", "2", "2", "is not True or False"),
        ("normalized", "maybe", "maybe", "is not True or False"),
        ("pooling", "max", "max", "'max' is not one of cls, mean"),
        ("save_strategy", "None", "null", "is not one of steps, no"),
        ("cutoffs", "x", "[1, x]", "'x' is not an integer"),
        ("cutoffs", "None", "null", "is not an integer"),
    ],
)
def test_mistakes_fail_alike_in_yaml_and_on_the_command_line(fails, field, line, yaml, message):
    assert re.search(message.replace("DASHES", "--"), on_line := fails(f"--{field}", line))
    assert re.search(message.replace("DASHES", ""), in_yaml := fails(yaml=f"{field}: {yaml}"))
    assert field in on_line and f"run.yaml: {'unknown key' if 'unknown' in message else ''}" in in_yaml
    assert field in in_yaml


@pytest.mark.parametrize("value", ["123", "1.5", "true", "[a]", "2024-01-01"])
def test_a_yaml_value_that_is_no_string_is_not_taken_for_one(fails, value):
    assert "is not a string; put it in quotes" in fails(yaml=f"run_name: {value}")


@pytest.mark.parametrize("argv", [["--max_steps"], ["--learning_rate"], ["--cutoffs"], ["--run_name"]])
def test_a_flag_without_its_value(fails, argv):
    assert "expected" in fails(*argv) and argv[0] in fails(*argv)


@pytest.mark.parametrize("argv", [["stray"], ["--no_bf16", "False"], ["--no_max_steps"], ["-x"]])
def test_what_is_no_flag_is_refused(fails, argv):
    assert f"unknown argument {argv[-1]}" in fails(*argv)


def test_missing_values_are_all_named(fails):
    assert fails(needed=[]) == "missing: --train_data, --output_dir"
    assert fails(yaml="output_dir: x", needed=[]) == "missing: --train_data"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("a: [1", "not readable YAML"),
        ("a: b: c", "not readable YAML"),
        ("\tmax_steps: 1", "not readable YAML"),
        (b"run_name: \xff\xfe", "not readable YAML"),
        ("- a\n- b", "expected `key: value` lines, found a list"),
        ("max_steps", "expected `key: value` lines, found a str"),
        ("1: 2", "unknown key 1"),
        ("config: other.yaml", "unknown key 'config'"),
        ("max_steps: 1\nbf16: true\nmax_steps: 2", "max_steps is given twice, in lines 1 and 3; keep one"),
        ("{max_steps: 1, 'max_steps': 1}", "max_steps is given twice, in lines 1 and 1; keep one"),
        ("max_steps: 1\nmax-steps: 2", "max-steps is given twice, the other time under another name; keep one"),
        ("norm_it: yes\nnormalized: no", "normalized is given twice, the other time under another name; keep one"),
    ],
)
def test_yaml_that_is_no_settings(fails, yaml, message):
    assert message in fails(yaml=yaml) and "run.yaml" in fails(yaml=yaml)


def test_yaml_may_merge_a_mapping_and_change_a_key_of_it(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: *b")
    found = load_yaml(str(tmp_path / "a.yaml"))
    assert found["c"] == {"x": 2, "y": 3} and found["b"] == found["d"] == {"x": 2, "y": 1}


def test_a_list_that_is_given_twice_is_refused(parse, fails):
    said = "--train_data is given twice; name all of its values after one --train_data"
    assert fails("--train_data", "b.jsonl") == fails("--train-data=b.jsonl") == said
    assert fails("--cutoffs", "1", "--cutoffs", "2") == said.replace("train_data", "cutoffs")
    assert parse("--train_data", "a.jsonl") == parse()  # nothing is dropped
    assert parse("--train_data", "b", yaml="train_data: [c]", needed=["--output_dir", "o"]).train_data == ["b"]


def test_of_a_value_given_twice_the_last_counts(parse):
    """scripts/slurm/finetune_single_node.sbatch has flags before "$@"."""
    assert parse("--max_steps", "1", "--max-steps", "2").max_steps == 2


def test_a_config_that_cannot_be_opened(fails, tmp_path):
    assert fails("--config", "nowhere.yaml") == "--config nowhere.yaml cannot be read: No such file or directory"
    assert "Is a directory" in fails("--config", str(tmp_path))


def test_an_empty_yaml_changes_nothing(parse):
    assert parse(yaml="") == parse(yaml="# only a comment\n") == parse()


def test_user_errors_end_the_program_with_the_message_alone(capsys, monkeypatch):
    def fail():
        with user_errors():
            raise ValueError("train.jsonl:3: wrong")

    monkeypatch.setattr(sys, "argv", ["/x/finetune.py"])
    with pytest.raises(SystemExit) as stop:
        fail()
    assert stop.value.code == 2 and capsys.readouterr().err == "finetune.py: error: train.jsonl:3: wrong\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        fail()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyError), user_errors():
        raise KeyError("ours")


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for name, message in [("./nowhere", "is not a folder"), (str(tmp_path / "empty"), "no config.json"),
                          ("~/x", "is not a folder"), ("a/b/c", "is not a folder"), (__file__, "not a folder")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^--model {re.escape(name)} .*{message}"):
            check_model_path("--model", name)
    for name in ("bert-base-uncased", "BAAI/bge-small-en-v1.5", str(tmp_path / "model")):
        check_model_path("--model", name)


# ---- refused flags


@pytest.mark.parametrize(
    "argv", [["--eval_strategy", "no"], ["--eval-strategy=no"], ["--do_train"], ["--do_train=True"]]
)
def test_a_refused_flag_that_asks_for_nothing_passes(parse, argv):
    assert parse(*argv) == parse()


@pytest.mark.parametrize("line", ["eval_strategy: no", "eval-strategy: 'no'", "do_train: true", "do_train: 'True'"])
def test_a_refused_yaml_key_that_asks_for_nothing_passes(parse, line):
    assert parse("--max_steps", "3", yaml=f"{line}\nrun_name: x") == parse("--max_steps", "3", "--run_name", "x")


@pytest.mark.parametrize("value", ["false", "no", "0"])
def test_a_refused_boolean_takes_false_in_every_spelling(parse, value):
    refused = {"push_to_hub": Refusal("upload it", ("False",))}
    assert parse("--push_to_hub", value, refused=refused) == parse()


def test_every_refused_flag_passes_what_is_harmless(parse, finetune_config):
    needed = ["--model_name_or_path", "m", *NEEDED]
    plain = parse(config_class=finetune_config, needed=needed, refused=REFUSED)
    for turn in range(max(len(refusal.harmless) for refusal in REFUSED.values())):
        pairs = {name: refusal.harmless[turn] for name, refusal in REFUSED.items() if turn < len(refusal.harmless)}
        line = [part for pair in pairs.items() for part in ("--" + pair[0], pair[1])]
        assert parse(*line, config_class=finetune_config, needed=needed, refused=REFUSED) == plain
        yaml = "\n".join(f"{name}: {value or repr(value)}" for name, value in pairs.items())
        assert parse(yaml=yaml, config_class=finetune_config, needed=needed, refused=REFUSED) == plain
    bare = [f"--{name}" for name, refusal in REFUSED.items() if "True" in refusal.harmless]
    assert bare and parse(*bare, config_class=finetune_config, needed=needed, refused=REFUSED) == plain


def test_every_other_refused_value_is_told_what_to_do_instead(fails, finetune_config):
    for name, refusal in REFUSED.items():
        assert "something" not in refusal.harmless
        expected, refused = f"{name} is not available: {refusal.use_instead}", {name: refusal}
        assert fails(f"--{name}", "something", refused=refused) == f"--{expected}"
        assert fails(f"--{name.replace('_', '-')}=something", refused=refused) == f"--{expected}"
        assert fails(yaml=f"{name}: something", refused=refused).endswith(f"run.yaml: {expected}")
        if "True" not in refusal.harmless:
            assert fails(f"--{name}", refused=refused) == f"--{expected}"
    message = fails("--lora_rank", "8", "--model_name_or_path", "m", config_class=finetune_config, refused=REFUSED)
    assert message == f"--lora_rank is not available: {REFUSED['lora_rank'].use_instead}"


def test_refusals_are_one_line_and_name_flags_that_exist(finetune_config):
    known = flags_of(finetune_config)
    for name, refusal in REFUSED.items():
        assert refusal.use_instead and "\n" not in refusal.use_instead
        ours = re.sub("`[^`]*`", "", refusal.use_instead)  # in backticks: other programs
        named = re.findall(r"--(\w+)", ours)
        assert set(named) <= known, f"{name}: {refusal.use_instead}"
        script = re.findall(r"scripts/\S+\.py", ours)
        assert all((FINETUNE.parent.parent / path).is_file() for path in script)


# ---- completeness


def test_no_flag_is_both_taken_and_refused(finetune_config):
    assert not flags_of(finetune_config) & set(REFUSED)


def test_every_flag_of_transformers_is_answered(finetune_config):
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(theirs) > 80 and sorted(theirs - flags_of(finetune_config) - set(REFUSED)) == []


# FlagEmbedding 1.4.2: abc/finetune/embedder/AbsArguments.py and finetune/embedder/**/arguments.py
FLAG_EMBEDDING = """
    model_name_or_path config_name tokenizer_name cache_dir trust_remote_code use_fast_tokenizer token
    train_data cache_path train_group_size query_max_len passage_max_len pad_to_multiple_of max_example_num_per_dataset
    query_instruction_for_retrieval query_instruction_format knowledge_distillation passage_instruction_for_retrieval
    passage_instruction_format shuffle_ratio same_dataset_within_batch small_threshold drop_threshold
    negatives_cross_device temperature fix_position_embedding sentence_pooling_method normalize_embeddings
    sub_batch_size kd_loss_type use_mrl mrl_dims
    colbert_dim unified_finetuning use_self_distill fix_encoder self_distill_start_step
    peft_model_path use_lora lora_rank lora_alpha lora_dropout target_modules use_flash_attn use_slow_tokenizer
    from_peft modules_to_save raw_peft additional_special_tokens save_merged_lora_model only_merge_lora_model
    example_query_max_len example_passage_max_len retrieval_use_examples icl_suffix_str
""".split()
# FlagEmbedding 1.2 (baai_general_embedding/finetune/arguments.py), where its names differ
FLAG_EMBEDDING_OLD = "normlized use_inbatch_neg".split()


@pytest.mark.parametrize("flag", FLAG_EMBEDDING + FLAG_EMBEDDING_OLD)
def test_every_flag_of_flag_embedding_is_answered(finetune_config, flag):
    assert flag in flags_of(finetune_config) | set(REFUSED)


def test_finetune_settings_survive_yaml(parse, finetune_config):
    needed = ["--model_name_or_path", "m", *NEEDED, "--learning_rate", "1e-5", "--save_strategy", "no"]
    cfg = parse(config_class=finetune_config, needed=needed, refused=REFUSED)
    assert parse(yaml=to_yaml(cfg), config_class=finetune_config, needed=[], refused=REFUSED) == cfg


# ---- help


def test_help_shows_every_flag_but_the_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"], description="Tunes a model.", refused=REFUSALS)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Tunes a model." in out and "50% of the steps (default: 2e-05)" in out
    assert {f"--{name}" for name in flags_of(Config)} <= set(re.findall(r"--\w+", out))
    assert "deepspeed" not in out and out.count("(required)") == 2 and "cls|mean" in out


@pytest.mark.parametrize("script", sorted((REPO / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help_needs_no_heavy_package(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)  # one script may read another's flags
    for package in ("torch", "transformers", "accelerate", "sentence_transformers", "datasets"):
        (tmp_path / f"{package}.py").write_text(f"raise SystemExit('{package} is imported for --help')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    blocked = [sys.executable, "-c", "import torch"]
    assert "is imported for --help" in subprocess.run(blocked, env=environment, capture_output=True, text=True).stderr
    done = subprocess.run([sys.executable, script, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = runpy.run_path(str(script))["Config"]
    assert {f"--{name}" for name in flags_of(config)} <= set(re.findall(r"--\w+", done.stdout))


def test_short_names_lead_to_the_long_ones(tmp_path: Path, run_script: Run) -> None:
    for name, script, meant in (
        ("batch_size", "finetune.py", "per_device_train_batch_size"),
        ("lr", "finetune.py", "learning_rate"),
        ("model", "evaluate_retrieval.py", "encoder"),
    ):
        assert f"did you mean --{meant}?" in run_script(script, f"--{name}", 1, status=2).stderr


def test_a_name_near_that_of_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, tiny_model: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        (tmp_path / "tuned").symlink_to(tiny_model)
        with pytest.raises(ValueError, match=r"--encoder tunde is not a folder; did you mean tuned\?"):
            check_model_path("--encoder", "tunde")
        check_model_path("--encoder", "tuned")
        check_model_path("--encoder", "BAAI/tunde")
        check_model_path("--encoder", "other")


# ---- rules between flags


@dataclass(kw_only=True)
class Ruled:
    measures: list[str] | None = option(None, "sets")
    often: bool = option(False, "measure often", needs={"measures": "there is nothing to measure on"})
    shares: bool = option(True, "share negatives")
    wide: bool = option(False, "of all processes", needs={"shares": "none are shared"}, affects_learning=False)
    half: bool = option(False, "half", excludes={"brain": "give one of them"})
    brain: str | None = option(None, "brain float", choices={"yes": 1, "no": 2})
    patience: int | None = option(None, "steps", at_least=1, needs={"measures": "there is nothing to measure on"})
    path: str = option("p", "a path", in_card="last part")
    files: list[str] = option(["a/b"], "files", in_card="file name")
    token: str | None = option(None, "a secret", in_card="never")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"often": True}, "--often needs --measures: there is nothing to measure on"),
        ({"patience": 3}, "--patience needs --measures: there is nothing to measure on"),
        ({"wide": True, "shares": False}, "--wide needs --shares: none are shared"),
        ({"half": True, "brain": "no"}, "--half and --brain exclude each other; give one of them"),
    ],
)
def test_flags_that_do_not_go_together_are_told_apart(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_rules(Ruled(**given))


def test_flags_that_go_together_pass(capsys):
    check_rules(Ruled())
    check_rules(Ruled(often=True, measures=["a"], patience=1, wide=True, brain="yes"))
    with pytest.raises(SystemExit):
        parse_config(Ruled, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "measure often (needs --measures)" in shown and "half (not with --brain)" in shown and "--brain yes|no" in shown
    )
    with pytest.raises(SystemExit):
        parse_config(Ruled, ["--brain", "maybe"])
    assert "'maybe' is not one of yes, no" in capsys.readouterr().err


def test_what_a_card_and_a_checkpoint_show_of_the_settings():
    given = Ruled(path="/home/me/model", files=["x/y.jsonl", "/z.jsonl"], token="secret")
    shown = shown_in_card(given)
    assert (shown.path, shown.files, shown.token) == ("model", ["y.jsonl", "z.jsonl"], None)
    assert shown_in_card(Ruled(path="hub/name")).path == "hub/name"
    assert without_secrets(given).token is None and given.token == "secret"
    assert "wide" not in learning_settings(given) and learning_settings(given)["half"] is False


def test_a_record_of_options_is_filled_from_the_flags_of_its_names():
    @dataclass(frozen=True)
    class Options:
        half: bool
        path: str
        rank: int

    assert options_from(Options, Ruled(half=True), rank=3) == Options(True, "p", 3)
