"""Operations that begin and end every list: members to fields, fields to a question, a question to a document."""

from __future__ import annotations

import numpy as np

from megatron_gemini.data.operations.registry import Operation, Sample, Setting, operation
from megatron_gemini.data.samples.document import build_conversation, build_document
from megatron_gemini.data.samples.tasks import format_example


@operation("decode")
def decode(setting: Setting) -> Operation:
    """`members`, bytes by name, to the fields that the task needs (`SampleDecoder.fields`). Sound becomes mono at 16
    kHz."""

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        fields = setting.decoder.fields(
            sample["members"], setting.task, sample["key"], setting.schema, sample.get("fetch")
        )
        return {"key": sample["key"], **fields}

    return apply


@operation("choose_caption", random=True)
def choose_caption(setting: Setting, first: float = 0.5) -> Operation:
    """The text is the first of the sample's captions with the probability `first`, otherwise any of the others."""
    if not 0 <= first <= 1:
        raise ValueError(f"first is {first}; it is a probability")

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        captions = sample.get("captions", [])
        take_first, other = random.random() < first, random.random()
        if len(captions) < 2 or take_first:
            return {**sample}
        return {**sample, "text": captions[1 + int(other * (len(captions) - 1))]}

    return apply


@operation("format", random=True)
def form(setting: Setting, caption_dropout: float = -1.0) -> Operation:
    """`prompt` and `answer` of the task, see `tasks.format_example`. caption_dropout: if not negative, in place of the
    usual."""
    if caption_dropout > 1:
        raise ValueError(f"caption_dropout is {caption_dropout}; it is a share, at most 1")
    dropout = caption_dropout if caption_dropout >= 0 else setting.caption_dropout

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        prompt, answer = format_example(setting.task, sample, setting.prompts, random, dropout)
        return {**sample, "prompt": prompt, "answer": answer}

    return apply


@operation("tokenize")
def tokenize(setting: Setting) -> Operation:
    """`document`: the question, or the whole conversation, as tokens, spans, loss marks and encoder inputs."""
    decoder = setting.decoder

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        given = {
            "layout": setting.layout,
            "text_tokenizer": setting.text_tokenizer,
            "encoders": decoder.encoders,
            "key": sample["key"],
        }
        if setting.task == "chat":
            return {**sample, "document": build_conversation(sample["messages"], **given)}
        prompt, answer = sample["prompt"], sample["answer"]
        return {**sample, "document": build_document(prompt, answer, loss_on_prompt=answer is None, **given)}

    return apply
