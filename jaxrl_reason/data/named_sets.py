"""Problem sets by name, for evaluations: place on the Hugging Face hub, columns, prompt and verifier of each.

Revisions are pinned, so that a set never changes. Repositories, revisions and columns are taken from public evaluation
code. The files of the hub have not been read yet; tests read local files with the same columns.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A problem set. Its split is always the whole file."""

    title: str
    repository: str  # of data sets on the hub
    revision: str  # a commit
    file: str  # * matches anything
    question: str = "question"  # our column `question` in the file; a dot selects a field
    answer: str = "answer"
    verifier: str = "accuracy"  # the reward that judges: numbers; math_verify reads every kind of answer
    template: str = "boxed"  # the prompt of a model without a run; a run keeps its own

    @property
    def source(self) -> str:
        """The name for `data.load_source`."""
        return f"hf://datasets/{self.repository}@{self.revision}/{self.file}"

    @property
    def columns(self) -> dict[str, str]:
        """Our names of the columns that the file names otherwise."""
        return {"question": self.question, "answer": self.answer}


NAMED_SETS: Mapping[str, NamedSet] = {
    "aime24": NamedSet(
        "AIME 2024",
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        "data/train-00000-of-00001.parquet",
        question="problem",
    ),
    "aime25": NamedSet(
        "AIME 2025", "opencompass/AIME2025", "a6ad95f611d72cf628a80b58bd0432ef6638f958", "aime2025-*.jsonl"
    ),
    "amc23": NamedSet(
        "AMC 2023", "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "test-00000-of-00001.parquet"
    ),
    "gsm8k": NamedSet(
        "GSM8K", "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main/test-00000-of-00001.parquet"
    ),
    "math500": NamedSet(
        "MATH-500",
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "test.jsonl",
        question="problem",
        verifier="math_verify",
    ),
    "minerva": NamedSet(
        "Minerva Math",
        "math-ai/minervamath",
        "ee46ddc498933b1977577953250ca5c66be64f96",
        "*test*",
        verifier="math_verify",
    ),
    "olympiadbench": NamedSet(
        "OlympiadBench, open-ended English mathematics without images",
        "Hothan/OlympiadBench",
        "91184b52131e7fc9455fef848035173aea8cc01a",
        "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        answer="final_answer.0",
        verifier="math_verify",
    ),
}
