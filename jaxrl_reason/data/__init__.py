"""Rows, prompt templates, tokenizers, and the batches of training and evaluation. Imports no other room of the package."""

from jaxrl_reason.data.chat import chat_template, ChatTemplate
from jaxrl_reason.data.prompts import get_template, PromptTemplate, Template, TEMPLATES
from jaxrl_reason.data.sources import load_source, Source, warn_of_repeats
from jaxrl_reason.data.streams import eval_prompts, PromptBatch, PromptStream, SolutionBatch, SolutionStream
from jaxrl_reason.data.tokenizer import fitted, load_tokenizer, Tokenizer, train_tokenizer

__all__ = [
    "ChatTemplate",
    "PromptBatch",
    "PromptStream",
    "PromptTemplate",
    "SolutionBatch",
    "SolutionStream",
    "Source",
    "TEMPLATES",
    "Template",
    "Tokenizer",
    "chat_template",
    "eval_prompts",
    "fitted",
    "get_template",
    "load_source",
    "load_tokenizer",
    "train_tokenizer",
    "warn_of_repeats",
]
