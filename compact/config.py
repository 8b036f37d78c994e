"""Recipes: dataclasses whose fields are the keys of a YAML recipe and the flags of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoraConfig:
    """LoRA on every linear layer of attention and feed-forward (method §3, the papers' recipe)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: list[str] | None = None  # module names; default: every linear layer of attention and feed-forward


@dataclass
class StudentConfig:
    model: str = "demo"  # a folder, a hub id, a .gguf file, or "demo": the embedded tiny student
    dtype: str = "auto"  # auto | float32 | bfloat16; auto: bfloat16 on GPUs that have it, else float32
    attention: str = "auto"  # auto | sdpa | flash_attention_2 | flash_attention_3 | flex_attention | compact_varlen | eager
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # null: full fine-tuning
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    train: str | None = None  # .jsonl, .parquet, a folder of a saved dataset, or a hub id; none: the embedded questions
    holdout: float = 0.2  # share of the questions held out for evaluation, split by question text
    answer_kind: str = "number"  # number | choice | yesno | math | text, for rows that have no "task" field
    prompt_template: str = "Question: {prompt}\nAnswer:"  # for string prompts and tokenizers without a chat template
    suffix: str = "\nThe answer is {answer}."  # ends every rationale, before EOS
    suffix_answer: str = "gold"  # gold | own
    wrong_answers: str = "keep"  # keep | drop
    overlong: str = "cut"  # cut | drop
    max_length: int = 1024  # tokens of prompt and completion
    thinking_words: list[str] = field(
        default_factory=lambda: (
            "therefore thus so hence because since wait hmm but however then first next finally let".split()
        )
    )


@dataclass
class AdaptabilityConfig:
    """Eq. 2–3."""

    weight: float = 1.0  # β1; 0 switches the metric off
    span: str = "body"  # body | all
    length_norm: str = "none"  # none (paper) | mean
    epsilon: float = 0.1  # M at other than thinking tokens


@dataclass
class ConsensusConfig:
    """Eq. 4–5."""

    weight: float = 1.0  # β2
    temperature: float = 1.0
    affinity: str = "attention"  # attention (paper) | cosine (final hidden states) | sentence (embeddings)
    centrality: str = "in_degree"  # in_degree (paper) | pagerank | eigenvector
    encoder: str | None = None  # sentence encoder for affinity = sentence: a folder or hub id


@dataclass
class DifficultyConfig:
    """Eq. 6."""

    weight: float = 1.0  # β3
    kind: str = "loss"  # loss (paper) | ifd


@dataclass
class WeightsConfig:
    """Eq. 7."""

    temperature: float = 1.0  # τ
    scale: str = "zscore"  # zscore (paper)
    teacher: str | None = None  # strategy = single: the teacher
    fixed: dict[str, float] | None = None  # strategy = fixed: a weight per teacher


@dataclass
class DivergenceConfig:
    """Eq. 9."""

    weight: float = 0.1  # λ; 0 switches it off
    kind: str = "strategy"  # strategy (its own choice: kl for COMPACT, jsd for MIND) | kl | jsd


@dataclass
class EvaluationConfig:
    tasks: dict[str, str] = field(default_factory=dict)  # name: file of questions, out of distribution
    forgetting: dict[str, str] = field(default_factory=dict)  # name: file of questions on skills not trained on
    limit: int = 200  # questions a task
    max_new_tokens: int = 192
    batch_size: int = 64
    instruct: bool = True  # end the prompts of `tasks` and `forgetting` in a line that says in what form to answer
    reference: str | None = None  # the teacher whose rationales are scored as reference solutions of held-out questions
    note: str | None = None  # a warning at the top of the report, about what its numbers may not be compared with


@dataclass
class CompactConfig:
    """The method: what α is and what the loss is (method §2–3, §5)."""

    strategy: str = "compact"  # compact | uniform | single | lowest_loss | fixed
    adaptability: AdaptabilityConfig = field(default_factory=AdaptabilityConfig)
    consensus: ConsensusConfig = field(default_factory=ConsensusConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    sft_reduction: str = "mean"  # mean | sum (eq. 8) | token


@dataclass
class Recipe(CompactConfig):
    """A whole run."""

    run: str = "runs/demo"  # the run's folder; nothing is written outside it
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, object] = field(default_factory=dict)  # any field of transformers.TrainingArguments
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
