"""Rows, prompt templates, tokenizers, and the batches of training and evaluation. Imports no other room of the package."""

from jaxrl_reason.data.chat import chat_template, ChatTemplate
from jaxrl_reason.data.prompts import get_template, PromptTemplate, Template, TEMPLATES
from jaxrl_reason.data.sources import load_source, Source, warn_of_repeats
from jaxrl_reason.data.streams import eval_prompts, PromptBatch, PromptStream, SolutionBatch, SolutionStream
from jaxrl_reason.data.tokenizer import fitted, load_tokenizer, Tokenizer, train_tokenizer
