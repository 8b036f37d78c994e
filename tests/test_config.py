"""Recipes: YAML and flags say the same, and every mistake is answered with its place and the way out."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch

from compact import options
from compact.config import (
    RECIPES,
    CompactConfig,
    ConsensusConfig,
    InformationConfig,
    LoraConfig,
    Recipe,
    StudentConfig,
    WeightsConfig,
    embedded_recipes,
    from_dict,
    load_recipe,
    save_recipe,
    to_dict,
)
from compact.errors import UserError
from compact.student import compute_dtype
from compact.training_arguments import NOT_IN_TRAINING, training_arguments
from compact.yamlfile import read_text


def written(tmp_path, text: str, name: str = "recipe.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_flags_and_yaml_give_the_same_recipe(tmp_path):
    file = written(
        tmp_path,
        """
        strategy: fixed
        adaptability: {span: all, weight: 0}
        weights: {fixed: {Llama-3.1-70B: 0.5, QwQ: 1}}
        student: {model: some/folder, lora: {rank: 8, targets: [q_proj, v_proj]}, gradient_checkpointing: true}
        data: {suffix: "\\nSo: {answer}", train: a.jsonl}
        training: {learning_rate: 5e-5, bf16: true, report_to: [wandb]}
        evaluation: {forgetting: {csqa: b.jsonl}}
        """,
    )
    flags = (
        "--strategy fixed --adaptability.span all --adaptability.weight=0 --weights.fixed.Llama-3.1-70B 0.5 "
        "--weights.fixed.QwQ 1 --student.model some/folder --student.lora.rank 8 "
        "--student.gradient_checkpointing --data.train a.jsonl --training.learning_rate 5e-5 --training.bf16 true "
        "--training.report_to [wandb] --evaluation.forgetting.csqa=b.jsonl"
    ).split()
    flags += ["--student.lora.targets", "[q_proj, v_proj]", "--data.suffix", r'"\nSo: {answer}"']
    empty = written(tmp_path, "", "empty.yaml")
    assert load_recipe([file]) == load_recipe([empty, *flags])
    assert load_recipe([file]).training == {"learning_rate": 5e-5, "bf16": True, "report_to": ["wandb"]}


def test_flags_beat_the_file_and_later_flags_beat_earlier_ones(tmp_path):
    file = written(tmp_path, "seed: 1\nstudent: {lora: {rank: 4, dropout: 0}}")
    recipe = load_recipe([file, "--seed", "2", "--student.lora.rank", "8", "--seed=3"])
    assert (recipe.seed, recipe.student.lora.rank, recipe.student.lora.dropout) == (3, 8, 0.0)


def test_null_switches_lora_off_and_a_key_of_lora_switches_it_on_again(tmp_path):
    file = written(tmp_path, "student: {lora: null}")
    assert load_recipe([file]).student.lora is None
    assert load_recipe([file, "--student.lora.rank", "2"]).student.lora == LoraConfig(rank=2)
    assert load_recipe([file, "--student.lora.rank", "2", "--student.lora", "null"]).student.lora is None


def test_text_is_taken_as_it_is_unless_quoted(tmp_path):
    empty = written(tmp_path, "")
    for given, meant in [("5", "5"), ("no", "no"), ("a: b # c", "a: b # c"), ("'5'", "5"), (r'"a\tb"', "a\tb")]:
        assert load_recipe([empty, "--student.model", given]).student.model == meant
    assert load_recipe([empty, "--data.train", "null"]).data.train is None


def test_numbers_in_every_spelling(tmp_path):
    for text, number in [("5e-5", 5e-5), ("5.0E-5", 5e-5), ("1", 1.0), ("1e1", 10.0), ("+2E+1", 20.0)]:
        temperature = load_recipe([written(tmp_path, f"weights: {{temperature: {text}}}")]).weights.temperature
        assert temperature == number and type(temperature) is float
    assert type(load_recipe([written(tmp_path, "data: {max_length: 1e3}")]).data.max_length) is int


def test_no_is_text_and_yes_is_no_boolean(tmp_path):
    assert load_recipe([written(tmp_path, "training: {save_strategy: no}")]).training == {"save_strategy": "no"}
    with pytest.raises(UserError, match="expected true or false, got 'yes'"):
        load_recipe([written(tmp_path, "training: {bf16: yes}")])


def test_a_saved_recipe_loads_as_the_same(tmp_path):
    recipe = Recipe(
        strategy="single",
        weights=WeightsConfig(teacher="5e-5", temperature=1e-07),
        student=StudentConfig(model="no", lora=None),
        training={
            "learning_rate": 3e-05,
            "save_strategy": "no",
            "run_name": "true",
            "optim": "adamw_torch",
            "lr_scheduler_kwargs": {"num_cycles": 1},
        },
    )
    recipe.data.suffix = "\n\\boxed{{answer}} é"
    path = tmp_path / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe([str(path)]) == recipe
    assert from_dict(to_dict(recipe)) == recipe


def test_saving_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    save_recipe(Recipe(seed=1), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        save_recipe(Recipe(seed=2), path)
    assert load_recipe([str(path)]).seed == 1
    assert os.listdir(tmp_path) == ["recipe.yaml"]


FLAG_MISTAKES = [
    (["--student.lora.rnk", "8"], r"--student.lora.rnk: unknown key; did you mean student.lora.rank\?"),
    (["--rank", "8"], r"--rank: unknown key; did you mean student.lora.rank\?"),
    (["--learning_rate", "8"], r"--learning_rate: unknown key; .*training.NAME"),
    (["--strategy", "unifrom"], r"--strategy: 'unifrom' is not one of compact, uniform, .*; did you mean uniform\?"),
    (["--data.holdout", "1"], r"--data.holdout: 1 is out of range: above 0 and below 1"),
    (["--data.holdout", "0.0"], r"--data.holdout: 0.0 is out of range"),
    (["--data.holdout"], r"--data.holdout: needs a value: a number"),
    (["--data.holdout", "--seed", "1"], r"--data.holdout: needs a value"),
    (["--data.max_length", "7"], r"out of range: at least 8"),
    (["--seed", "1.5"], r"--seed: expected a whole number, got 1.5"),
    (["--seed", "true"], r"--seed: expected a whole number, got True"),
    (["--seed", "null"], r"--seed: expected a whole number, got null"),
    (["--weights.temperature", "0"], r"out of range: above 0"),
    (["--weights.temperature", ".inf"], r"expected a number, got inf"),
    (["--weights.temperature", ".nan"], r"expected a number, got nan"),
    (["--student.lora.rank", "0"], r"out of range: at least 1"),
    (["--student.lora", "8"], r"--student.lora: has keys of its own, such as --student.lora.rank, or is null"),
    (["--student.trust_remote_code", "maybe"], r"expected true or false, got 'maybe'"),
    (["--weights.fixed.a", "-1"], r"--weights.fixed.a: -1 is out of range: at least 0"),
    (["--evaluation.tasks", "{a: b"], r"--evaluation.tasks: not valid YAML"),
    (["--seed="], r"--seed: needs a value: a whole number"),
    (["--evaluation.tasks", "{a: 1}"], r"--evaluation.tasks: evaluation.tasks.a: expected text, got 1; put quotes"),
    (["--evaluation.tasks.a/b", "x"], r"the task 'a/b' must be named as a file can be"),
    (["--seed", "1", "gsm8k"], r"gsm8k: expected a flag .*it comes first"),
    (["-seed", "1"], r"-seed: expected a flag"),
    (["--student.lora.targets", "q_proj"], r"--student.lora.targets: expected a list .*; write \[q_proj\]"),
    (["--training.learning_rte", "1"], r"--training.learning_rte: .* no such field; did you mean learning_rate\?"),
    (["--training.warmup_steps", "few"], r"--training.warmup_steps: expected a number, got 'few'"),
    (["--training.bf16", "1"], r"--training.bf16: expected true or false, got 1"),
    (["--training.lr_scheduler_type", "cosin"], r"'cosin' is not one of linear, cosine, .*; did you mean cosine\?"),
    (["--training.output_dir", "x"], r"--training.output_dir: the run's folder is the key run"),
    (["--training.average_tokens_across_devices", "false"], r"False is refused: a step is normalised over all"),
    (["--training.label_smoothing_factor", "0.1"], r"the loss is the method's own"),
    (["--training.save_only_model", "true"], r"True is refused: a stopped run could not go on as if nothing had been"),
    (["--training.ignore_data_skip", "true"], r"True is refused: a stopped run could not go on as if nothing had"),
    (["--training.enable_jit_checkpoint", "true"], r"True is refused: a run stopped by it would be taken"),
    (["--training.auto_find_batch_size", "true"], r"True is refused: out of memory it begins again"),
]


@pytest.mark.parametrize(("flags", "message"), FLAG_MISTAKES, ids=[" ".join(flags) for flags, _ in FLAG_MISTAKES])
def test_a_mistaken_flag_is_named_with_the_way_out(tmp_path, flags, message):
    base = [] if flags[0] == "-seed" else [written(tmp_path, "")]
    with pytest.raises(UserError, match=message):
        load_recipe([*base, *flags])


FILE_MISTAKES = [
    (
        "seed: 1\nstudent:\n  lroa:\n    rank: 8\n",
        r"recipe.yaml:3: student.lroa: unknown key; did you mean student.l",
    ),
    ("student:\n  rank: 8\n", r"recipe.yaml:2: student.rank: unknown key; did you mean student.lora.rank\?"),
    ("\ndata:\n  holdout: 2\n", r"recipe.yaml:3: data.holdout: 2 is out of range: above 0 and below 1"),
    ("seed: 1\nrun: a\nseed: 2\n", r"recipe.yaml:3: seed: given twice, first at .*recipe.yaml:1"),
    ("student: demo\n", r"recipe.yaml:1: student: expected keys and values, got 'demo'"),
    ("run: 5\n", r"recipe.yaml:1: run: expected text, got 5; put quotes around it"),
    ("run: a\n  seed: 1\n", r"recipe.yaml:2: not valid YAML: mapping values are not allowed here"),
    ("run: a\ntraining: [\n", r"recipe.yaml:3: not valid YAML"),
    ("run: {{ name }}\n", r"recipe.yaml:1: a key is expected, and there are brackets"),
    ("run: 2024-13-45\n", r"recipe.yaml:1: '2024-13-45' is no value: month must be"),
    ("seed: 1:00\n", r"recipe.yaml:1: seed: expected a whole number, got '1:00'"),
    ("- run\n", r"recipe.yaml:1: expected keys and values"),
    ("training:\n  bf16: true\n  sed: 3\n", r"recipe.yaml:3: training.sed: .* did you mean seed\?"),
    ("training: 3\n", r"recipe.yaml:1: training: expected names with any value each, got 3"),
    (
        "student:\n  model: !required a folder\n",
        r"recipe.yaml:2: student.model: is yours to give \(a folder\): --",
    ),
    ("run: !!python/object:os.system x\n", r"recipe.yaml:1: not valid YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES, ids=[text.strip() for text, _ in FILE_MISTAKES])
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe([written(tmp_path, text)])


@pytest.mark.parametrize("text", ["a recipe", "- run", "5"])
def test_a_file_that_holds_no_keys_is_no_recipe_whatever_flags_follow(tmp_path, text):
    with pytest.raises(UserError, match="recipe.yaml:1: expected keys and values"):
        load_recipe([written(tmp_path, text), "--seed", "1"])


def test_whole_numbers_are_those_of_yaml_1_2(tmp_path):
    assert load_recipe([written(tmp_path, "seed: 010\n")]).seed == 10
    assert load_recipe([written(tmp_path, "evaluation: {limit: 12_000}\n")]).evaluation.limit == 12_000
    save_recipe(Recipe(run="08"), tmp_path / "saved.yaml")
    assert load_recipe([str(tmp_path / "saved.yaml")]).run == "08"


def test_a_missing_recipe_is_answered_with_the_embedded_ones():
    with pytest.raises(
        UserError, match=r"papr: no such file, nor an embedded recipe \(.*gsm8k, paper.*\); .* paper\?"
    ):
        load_recipe(["papr"])


def test_a_folder_or_bytes_as_a_recipe_are_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read: Is a directory"):
        load_recipe([str(tmp_path)])
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="r.yaml: not UTF-8 text"):
        load_recipe([str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CompactConfig(strategy="unifrom"), r"strategy: 'unifrom' is not one of"),  # type: ignore[arg-type]
        (CompactConfig(consensus=ConsensusConfig(temperature=-1)), "consensus.temperature: -1 is out of range"),
        (CompactConfig(consensus=0), "consensus: expected ConsensusConfig"),  # type: ignore[arg-type]
        (CompactConfig(strategy="single"), "weights.teacher: strategy single needs it"),
        (CompactConfig(strategy="fixed"), "weights.fixed: strategy fixed needs it"),
        (CompactConfig(weights=WeightsConfig(teacher="a")), "weights.teacher: only strategy single reads it"),
        (CompactConfig(weights=WeightsConfig(fixed={"a": 1.0})), "weights.fixed: only strategy fixed reads it"),
        (CompactConfig(strategy="fixed", weights=WeightsConfig(fixed={"a": 0.0})), "at least one weight"),
        (CompactConfig(consensus=ConsensusConfig(encoder="e")), "consensus.encoder: only affinity sentence reads it"),
        (Recipe(consensus=ConsensusConfig(affinity="sentence")), "consensus.encoder: affinity sentence needs it"),
        (Recipe(student=StudentConfig(lora=LoraConfig(targets=[]))), "student.lora.targets: names no module"),
        (Recipe(training={"sede": 1}), r"training.sede: .* did you mean seed\?"),
        (Recipe(run=""), "run: needs the name of a folder"),
    ],
)
def test_configs_made_in_python_are_checked_alike(config, message):
    with pytest.raises(UserError, match=message):
        config.validate()


def test_what_is_right_passes():
    CompactConfig(strategy="uniform").validate()
    CompactConfig(strategy="single", weights=WeightsConfig(teacher="a")).validate()
    CompactConfig(consensus=ConsensusConfig(affinity="sentence")).validate()  # the data may bring the embeddings
    Recipe(training={"average_tokens_across_devices": True, "warmup_steps": 0.03, "data_seed": None}).validate()


def test_sections_may_be_dicts():
    config = CompactConfig(consensus={"weight": 0}, information={"every": 2})  # type: ignore[arg-type]
    assert config == CompactConfig(consensus=ConsensusConfig(weight=0), information=InformationConfig(every=2))
    with pytest.raises(UserError, match=r"consensus\.wieght: unknown key; did you mean consensus\.weight\?"):
        CompactConfig(consensus={"wieght": 0})  # type: ignore[arg-type]


def test_a_suffix_or_template_without_its_slot_is_refused():
    with pytest.raises(UserError, match=r"data.suffix: must hold \{answer\} once"):
        from_dict({"data": {"suffix": "The answer."}})
    with pytest.raises(UserError, match=r"data.prompt_template: must hold \{prompt\} once"):
        from_dict({"data": {"prompt_template": "{prompt} {prompt}"}})


def test_a_task_is_either_out_of_distribution_or_forgetting():
    with pytest.raises(UserError, match="csqa is both in tasks and in forgetting"):
        from_dict({"evaluation": {"tasks": {"csqa": "a"}, "forgetting": {"csqa": "b"}}})


def test_no_task_takes_the_name_of_all_of_them():
    with pytest.raises(UserError, match="no task can be named all"):
        from_dict({"evaluation": {"tasks": {"all": "a.jsonl"}}})


@pytest.mark.parametrize("dtype, bf16", [("float32", True), ("bfloat16", False)])
def test_bf16_and_the_student_s_dtype_say_the_same(dtype, bf16):
    given = {"student": {"dtype": dtype}, "training": {"bf16": bf16, "use_cpu": True}}
    with pytest.raises(UserError, match=f"training.bf16: {str(bf16).lower()}, and the student computes in {dtype}"):
        training_arguments(from_dict(given))


def test_a_gpu_that_only_emulates_bfloat16_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert compute_dtype(StudentConfig()) == torch.float32


def test_every_key_has_a_meaning_and_a_default_that_passes():
    for key, _, spec in options.walk(Recipe):
        assert spec.metadata.get("help"), f"{key}: declare it with option(default, meaning)"
    Recipe().validate()


def test_defaults_are_not_shared_between_recipes():
    Recipe().data.thinking_words.append("x")
    Recipe().training["a"] = 1
    assert "x" not in Recipe().data.thinking_words and Recipe().training == {}


def test_help_shows_every_key_with_a_default_that_loads_as_itself(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_recipe(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    shown = dict(match.groups() for line in lines if (match := re.match(r"  --(\S+) ?(.*)", line)))
    assert list(shown) == [key for key, _, _ in options.walk(Recipe)]
    empty = written(tmp_path, "")
    flags = [word for key, value in shown.items() if value for word in (f"--{key}", value)]
    assert load_recipe([empty, *flags]) == Recipe()


def test_what_training_refuses_are_fields_or_were():
    from transformers import TrainingArguments

    names = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    assert set(NOT_IN_TRAINING) - names <= {"activation_checkpointing", "gradient_checkpointing"}  # one is the older


@pytest.mark.parametrize("name", embedded_recipes())
def test_every_embedded_recipe_loads_once_its_gaps_are_given(name):
    source = (RECIPES / f"{name}.yaml").read_text()
    gaps = [
        f"--{section}.{key}={section}-{key}"
        for section, given in read_text(source, name).value.items()
        if isinstance(given.value, dict)
        for key, item in given.value.items()
        if isinstance(item.value, options.Required)
    ]
    recipe = load_recipe([name, *gaps])
    assert recipe.run == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_takes_its_configs(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)
