"""Recipes: dataclasses whose fields are the keys of a YAML recipe and the flags of the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compact import options
from compact.commandline import help_lines, set_flags
from compact.errors import UserError
from compact.options import Given, as_given, option
from compact.training_arguments import check_training
from compact.yamlfile import read_file, write_file

RECIPES = Path(__file__).parent / "recipes"
THINKING_WORDS = "therefore thus so hence because since wait hmm but however then first next finally let".split()


@dataclass
class LoraConfig:
    """LoRA on every linear layer of attention and feed-forward (method §3, the papers' recipe)."""

    rank: int = option(16, "rank of the adapter's matrices", ge=1)
    alpha: float = option(32.0, "the adapter's product is scaled by alpha / rank", gt=0)
    dropout: float = option(0.05, "dropout on the adapter's input", ge=0, lt=1)
    targets: list[str] | None = option(None, "module names; null: every linear layer of attention and feed-forward")


@dataclass
class StudentConfig:
    model: str = option("demo", "a folder, a hub id, a .gguf file, or demo: the embedded tiny student")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "of the computation (weights that train stay float32); auto: bfloat16 on GPUs that have it, else float32",
    )
    attention: Literal[
        "auto",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
        "compact_varlen",
        "eager",
    ] = option("auto", "implementation; auto: the fastest here that never makes a mask over the packed row")
    lora: LoraConfig | None = option(LoraConfig, "null: full fine-tuning")
    gradient_checkpointing: bool = option(False, "less memory for about a third more time")
    compile: bool = option(
        False,
        "torch.compile of the layers, in training passes: less time a step after slow first ones; at most 20 graphs "
        "whatever the shapes of the batches, 4 where all layers are alike",
    )
    trust_remote_code: bool = option(False, "run the Python code that a model folder brings")


@dataclass
class DataConfig:
    train: str | None = option(
        None, ".jsonl, .parquet, a folder of a saved dataset, or a hub id; null: the embedded questions"
    )
    holdout: float = option(0.2, "share of the questions held out for evaluation, split by question text", gt=0, lt=1)
    held_out: str | None = option(None, "a file of held-out questions, in the form of train; then holdout is not used")
    answer_kind: Literal["number", "choice", "yesno", "math", "text"] = option(
        "number", "how answers are compared on rows that have no task of their own"
    )
    prompt_template: str = option(
        "Question: {prompt}\nAnswer:", "for prompts that are text and tokenizers without a chat template"
    )
    suffix: str = option("\nThe answer is {answer}.", "ends every rationale, before EOS")
    suffix_answer: Literal["gold", "own"] = option("gold", "whose answer the suffix states; own: the teacher's")
    wrong_answers: Literal["keep", "drop"] = option("keep", "rationales whose own answer is wrong")
    overlong: Literal["cut", "drop"] = option("cut", "rationales longer than max_length; cut: the body, never the end")
    max_length: int = option(1024, "tokens of prompt and completion", ge=8)
    thinking_words: list[str] = option(
        lambda: list(THINKING_WORDS), "whole words, any case, at which adaptability counts in full (eq. 3)"
    )

    def validate(self, names: Collection[str] | None = None) -> None:
        """
        Args:
            names: of the options that are looked at; all.

        Raises:
            UserError: a wrong type, a value out of range, or a template without its slot.
        """
        options.check(self, "data", names)
        for key, slot in (("suffix", "{answer}"), ("prompt_template", "{prompt}")):
            if (text := getattr(self, key)).count(slot) != 1:
                raise UserError(f"data.{key}: must hold {slot} once, got {text!r}")


@dataclass
class AdaptabilityConfig:
    """Eq. 2–3."""

    weight: float = option(1.0, "β1; 0 switches the metric off", ge=0)
    span: Literal["body", "all"] = option("body", "tokens of the rationale that the sum runs over")
    length_norm: Literal["none", "mean"] = option("none", "none: a sum (paper); mean: divided by the body's length")
    epsilon: float = option(0.1, "M at other than thinking tokens", ge=0, le=1)
    control: Literal["none", "shuffled_mask", "wrong_answer"] = option(
        "none", "what the metric should not survive: thinking tokens at random places, another question's answer"
    )


@dataclass
class ConsensusConfig:
    """Eq. 4–5."""

    weight: float = option(1.0, "β2; 0 switches the metric off", ge=0)
    temperature: float = option(1.0, "divides the affinities before the softmax", gt=0)
    affinity: Literal["attention", "cosine", "sentence"] = option(
        "attention", "attention: the student's own (paper); cosine: of its final states; sentence: of embeddings"
    )
    centrality: Literal["in_degree", "pagerank", "eigenvector"] = option("in_degree", "in_degree is the paper's")
    encoder: str | None = option(
        None, "sentence encoder for affinity sentence, or mind.features sentence: a folder or hub id"
    )


@dataclass
class DifficultyConfig:
    """Eq. 6."""

    weight: float = option(1.0, "β3; 0 switches the metric off", ge=0)
    kind: Literal["loss", "log_loss", "ifd"] = option(
        "loss",
        "loss (paper); log_loss: its logarithm, so that one rationale far harder than the others does not hide how "
        "these differ; ifd: over the loss without the question",
    )


@dataclass
class WeightsConfig:
    """Eq. 7."""

    temperature: float = option(1.0, "τ", gt=0)
    scale: Literal["zscore"] = option("zscore", "how a metric is made comparable within a question (paper)")
    teacher: str | None = option(None, "strategy single: the teacher")
    fixed: dict[str, float] | None = option(None, "strategy fixed: a weight per teacher", ge=0)


@dataclass
class DivergenceConfig:
    """Eq. 9."""

    weight: float = option(0.1, "λ; 0 switches it off", ge=0)
    kind: Literal["strategy", "kl", "jsd"] = option("strategy", "strategy: its own choice, kl for COMPACT")


@dataclass
class GradientsConfig:
    """Per-rationale gradient norms (method §6)."""

    norms: Literal["off", "exact", "unweighted", "hutchinson"] = option(
        "off",
        "measure each rationale's gradient over all parameters; unweighted: what it is before α, also where α is 0 "
        "(head frozen, divergence.weight 0); hutchinson: by random projections",
    )
    every: int = option(1, "optimizer steps between two measurements of the norms", ge=1)
    probes: int = option(16, "projections of hutchinson", ge=2, le=64)
    cap: float | None = option(None, "longest gradient of a rationale's weighted loss, by cap_by", gt=0)
    cap_by: Literal["hidden", "last"] = option(
        "hidden",
        "hidden: at the last hidden state, exactly (the head must be frozen); last: over all parameters, by what the "
        "rationale's norm was when it was seen last, times its weight now (needs norms; one process)",
    )


@dataclass
class InformationConfig:
    """Mutual information along the rationales while training (method §7). Nothing of it enters the weights."""

    every: int = option(0, "optimizer steps between two measurements; 0: off", ge=0)
    queue: int = option(256, "questions that PHSIC and HSIC pair a state with, the newest", ge=4)


@dataclass
class MindConfig:
    """MIND's Teaching Assistant (method §4)."""

    features: Literal["student", "sentence"] = option(
        "student",
        "of a path: the student's mean hidden state, or its embedding with the question by consensus.encoder (paper)",
    )
    width: int = option(256, "of the MLP and of attention; heads must divide it", ge=1)
    heads: int = option(4, "of attention across the paths of a question", ge=1)
    attention: bool = option(True, "false: every path is scored alone")
    temperature: float = option(1.0, "τ of L_meta", gt=0)
    threshold: float = option(0.8, "β: a path is used if its score is at least so much of the best one", ge=0, le=1)
    student_temperature: float = option(0.1, "τ_student of α", gt=0)
    inertia: Literal["optimizer", "ema"] = option(
        "optimizer", "optimizer (paper): learns more slowly than the student; ema: also from averages of its losses"
    )
    rate: float = option(0.1, "learning rate, times the student's, whose schedule it follows", gt=0)
    accumulation: int = option(4, "steps of the student to one of the assistant", ge=1)
    decay: float = option(0.9, "inertia ema: what a path's average keeps of itself", ge=0, lt=1)
    warmup: float = option(1.0, "epochs in which the assistant learns alone, before the student's first step", ge=0)
    warmup_rate: float = option(1e-3, "learning rate in these epochs", gt=0)


@dataclass
class EvaluationConfig:
    tasks: dict[str, str] = option(dict, "name: file of questions, out of distribution")
    forgetting: dict[str, str] = option(dict, "name: file of questions on skills not trained on")
    limit: int = option(200, "questions a task", ge=1)
    seed: int | None = option(None, "draws a task's questions where it has more; null: the run's seed", ge=0)
    max_new_tokens: int = option(192, "tokens generated for a question at most", ge=1)
    batch_size: int = option(64, "questions generated at once", ge=1)
    instruct: bool = option(True, "end prompts of tasks and forgetting in a line that says in what form to answer")
    reference: str | None = option(None, "teacher whose rationales are scored as solutions of held-out questions")
    held_text: str | None = option(
        None, "text on which the distance KL(base || student) is measured: .jsonl (prompt, solution, …) or one a line"
    )
    note: str | None = option(None, "a warning at the top of the report: what its numbers may not be set beside")


CAP_AND_HEAD = (
    "gradients.cap: the output head trains, and its own gradient cannot be capped in the same backward pass; set "
    "gradients.cap_by to last, train with LoRA, freeze the head, or set gradients.cap to null"
)
StrategyName = Literal["compact", "uniform", "single", "lowest_loss", "ca_mkd", "fixed", "mind", "MODULE:CLASS"]


@dataclass
class CompactConfig:
    """The method: what α is and what the loss is (method §2–3, §5)."""

    strategy: StrategyName = option(
        "compact", "what α is; MODULE:CLASS: a subclass of compact.strategies.Strategy, of your own"
    )
    adaptability: AdaptabilityConfig = option(AdaptabilityConfig, "eq. 2–3")
    consensus: ConsensusConfig = option(ConsensusConfig, "eq. 4–5")
    difficulty: DifficultyConfig = option(DifficultyConfig, "eq. 6")
    weights: WeightsConfig = option(WeightsConfig, "eq. 7")
    divergence: DivergenceConfig = option(DivergenceConfig, "eq. 9")
    gradients: GradientsConfig = option(GradientsConfig, "per-rationale gradient norms")
    information: InformationConfig = option(InformationConfig, "mutual information while training")
    mind: MindConfig = option(MindConfig, "strategy mind: its Teaching Assistant")
    sft_reduction: Literal["mean", "sum", "token"] = option(
        "mean", "of L_SFT over a rationale's tokens; sum: eq. 8; token: over all tokens of the step"
    )
    head_dtype: Literal["auto", "float32"] = option(
        "auto",
        "of the head's products; auto: the forward's own, under autocast that; float32: without autocast, slower (the "
        "head must be in float32: not LoRA in bfloat16)",
    )
    workspace_mib: int = option(
        512,
        "MiB of logits that may exist at once; fewer are slower; with a head that trains, all at once are fastest",
        ge=1,
    )

    def __post_init__(self) -> None:
        """Sections may be dicts: ``CompactConfig(consensus={"weight": 0})``."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(CompactConfig)}
        for name, value in given.items():
            if isinstance(value, dict):
                section = options.hints(CompactConfig)[name]
                setattr(self, name, options.build(section, as_given(value), name))

    def validate(self) -> None:
        """Check every field, and that nothing set here would be ignored.

        Raises:
            UserError: a wrong type, a value out of range, or options that contradict each other.
        """
        options.check(self)
        weights = self.weights
        for name, strategy, value in (("teacher", "single", weights.teacher), ("fixed", "fixed", weights.fixed)):
            if self.strategy == strategy and not value:
                raise UserError(f"weights.{name}: strategy {strategy} needs it")
            if self.strategy != strategy and value is not None:
                raise UserError(
                    f"weights.{name}: only strategy {strategy} reads it, and strategy is {self.strategy}: "
                    f"set it to null or set strategy to {strategy}"
                )
        if weights.fixed is not None and not any(weights.fixed.values()):
            raise UserError("weights.fixed: at least one weight must be above 0")
        if self.consensus.encoder is not None and not self.reads_embeddings:
            raise UserError(
                f"consensus.encoder: only affinity sentence reads it, or mind.features sentence, and "
                f"consensus.affinity is {self.consensus.affinity}"
            )
        gradients = self.gradients
        if gradients.cap is not None and gradients.cap_by == "last" and gradients.norms == "off":
            raise UserError("gradients.cap_by: last caps by measured norms; set gradients.norms to exact")
        if gradients.every > 1 and gradients.norms == "off":
            raise UserError("gradients.every: only gradients.norms reads it, and that is off")
        if gradients.every > 1 and gradients.cap is not None and gradients.cap_by == "last":
            raise UserError("gradients.every: gradients.cap_by last caps by the norms of every step; set it to 1")
        if gradients.cap is None and gradients.cap_by != "hidden":
            raise UserError("gradients.cap_by: only gradients.cap reads it, and that is null")
        if gradients.norms == "unweighted" and self.divergence.weight:
            raise UserError(
                "gradients.norms: unweighted needs divergence.weight 0, for the divergence mixes rationales; set that "
                "or take exact"
            )
        if self.mind_reads_embeddings and self.consensus.affinity == "sentence":
            raise UserError(
                "mind.features: sentence embeds a question with its rationale, and consensus.affinity sentence wants "
                "the rationale alone: set consensus.affinity to attention or cosine"
            )
        if self.mind.width % self.mind.heads:
            raise UserError(f"mind.heads: {self.mind.heads} does not divide mind.width, which is {self.mind.width}")

    @property
    def reads_embeddings(self) -> bool:
        """Whether the method reads sentence embeddings of the rationales."""
        return self.mind_reads_embeddings or self.consensus.affinity == "sentence"

    @property
    def mind_reads_embeddings(self) -> bool:
        """Whether they are MIND's features: of the question and the rationale together."""
        return self.strategy == "mind" and self.mind.features == "sentence"


@dataclass
class DemoConfig:
    """The embedded default: what stands in for ``data.train: null`` and ``student.model: demo``."""

    questions: int = option(1600, "questions to train on", ge=8)
    pretraining_steps: int = option(400, "steps in which the tiny student learns its skills", ge=1)
    arms: list[Literal["uniform", "lowest_loss", "terse", "verbose", "regrouping", "misleading"]] = option(
        list, "what to train beside the run and to compare it with: strategies, or teachers who teach alone"
    )


@dataclass
class Recipe(CompactConfig):
    """A whole run."""

    run: str = option("runs/demo", "the run's folder; nothing is written outside it")
    seed: int = option(0, "of everything random", ge=0, lt=2**32)
    student: StudentConfig = option(StudentConfig, "")
    data: DataConfig = option(DataConfig, "")
    training: dict[str, object] = option(dict, "any field of transformers.TrainingArguments")
    evaluation: EvaluationConfig = option(EvaluationConfig, "")
    demo: DemoConfig = option(DemoConfig, "")

    def validate(self) -> None:
        super().validate()
        check_training(as_given(self.training))
        if self.gradients.cap is not None and self.gradients.cap_by == "hidden" and self.student.lora is None:
            raise UserError(CAP_AND_HEAD)
        if not self.run:
            raise UserError("run: needs the name of a folder")
        if self.demo.arms and self.data.train is not None:
            raise UserError(
                "demo.arms: only the embedded questions have them, and data.train names others: "
                "add --demo.arms [] or name another recipe"
            )
        if self.reads_embeddings and self.consensus.encoder is None:
            key = "affinity sentence" if self.consensus.affinity == "sentence" else "mind.features sentence"
            raise UserError(f"consensus.encoder: {key} needs it: a folder or hub id of a sentence encoder")
        self.data.validate()
        if self.student.lora is not None and self.student.lora.targets == []:
            raise UserError("student.lora.targets: names no module; for full fine-tuning set student.lora to null")
        tasks, forgetting = self.evaluation.tasks, self.evaluation.forgetting
        for name in sorted(tasks.keys() & forgetting.keys()):
            raise UserError(f"evaluation: {name} is both in tasks and in forgetting")
        for name in (*tasks, *forgetting):
            if name in ("all", "held_out"):
                taken = "a study's tasks together" if name == "all" else "the run's own held-out questions"
                raise UserError(f"evaluation: no task can be named {name}, which are {taken}; rename it")
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise UserError(
                    f"evaluation: the task {name!r} must be named as a file can be: letters, digits, . _ -"
                )


def embedded_recipes() -> list[str]:
    """Names that `load_recipe` takes for the recipes of this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(argv: list[str]) -> Recipe:
    """A recipe from the words of a command line: `[RECIPE] [--key value …]`.

    RECIPE is a file or the name of an embedded recipe (default: demo); flags beat it (see `commandline.set_flags`).
    `--help` prints all keys and exits.

    Raises:
        UserError: whatever is wrong, with file and line or flag.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    named = bool(argv) and not argv[0].startswith("-")
    tree = read_recipe(argv[0] if named else None)
    set_flags(Recipe, tree, argv[1:] if named else argv)
    if "training" in tree.value and isinstance(tree.value["training"].value, dict):
        check_training(tree.value["training"])  # here too: places are known here
    return checked(tree)


def read_recipe(name: str | None) -> Given:
    """The Given tree of a file or an embedded recipe; None: demo."""
    embedded = RECIPES / f"{name or 'demo'}.yaml"
    if name is None or (name in embedded_recipes() and not Path(name).is_file()):
        return read_file(embedded) if embedded.exists() else Given({})
    if not Path(name).exists():
        near = options.nearest(name, embedded_recipes())
        raise UserError(f"{name}: no such file, nor an embedded recipe ({', '.join(embedded_recipes())}){near}")
    return read_file(Path(name))


def checked(tree: Given) -> Recipe:
    """A checked recipe from a tree of what somebody gave, whose places errors name."""
    recipe = options.build(Recipe, tree)
    recipe.validate()
    return recipe


def from_dict(values: dict[str, Any]) -> Recipe:
    """A checked recipe from plain nested values."""
    return checked(as_given(values))


def to_dict(recipe: CompactConfig) -> dict[str, Any]:
    """Plain nested values that `from_dict` takes back."""
    return dataclasses.asdict(recipe)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every key, also those left at their default; the file is replaced whole or not at all."""
    write_file(to_dict(recipe), Path(path))


def help_text() -> str:
    lines = [
        "python -m compact.train [RECIPE] [--key value …]",
        "",
        f"RECIPE: a YAML file, or one of {', '.join(embedded_recipes())}. Without it: demo.",
        "Flags are the recipe's keys and beat it. Values are YAML: null, true, 5e-5, [a, b], {a: 1}. The entries of",
        "names have flags too: --training.learning_rate 1e-4, --evaluation.tasks.svamp FILE. Keys and their defaults:",
        "",
        *help_lines(Recipe),
    ]
    return "\n".join(lines)
