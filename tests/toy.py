"""Small stand-ins that need no network and no files."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Question: Tom has 12 eggs and buys 36 more. How many eggs does he have?\nAnswer:",
    "First he has 12 eggs, so 12 + 36 = 48. Therefore the total is 48 eggs.",
    "Wait, because each child gets the same number, we divide 36 / 4 = 9 eggs per child.",
    "Then 5 * 10 = 50 degrees, hence 32 + 50 = 82. However, finally let us check.",
    "The answer is 72.\nThe answer is yes.\nThe answer is no.\nThe answer is (C).",
    "The great pyramids sit at an angle of 32 degrees from the ground; the sun moves 5 degrees an hour.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=1)
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def toy_tokenizer(
    chat_template: bool = False, *, add_bos: bool = False, vocab_size: int = 384
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained in memory: any text makes the round trip. Pad 0, BOS 1, EOS 2; at most 384 ids.

    With `chat_template` it has one, and ``<|end|>`` (id 4) is its EOS, as in SmolLM2-Instruct. With `add_bos` it
    puts BOS before every text it encodes with special tokens, as Llama's does.
    """
    tokenizer = Tokenizer.from_str(_trained(vocab_size))
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>" if chat_template else "</s>",
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast
