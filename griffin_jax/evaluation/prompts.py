"""The prompt format of GRIFFIN's summarisation experiments: examples with their summaries, then the article."""

from __future__ import annotations

from collections.abc import Sequence

STOP = "###"
"""Begins the next example, and so ends an answer."""

SENTENCES = {"xsum": 1, "cnn": 3}
"""How many sentences each dataset's summaries are asked to have."""


def summarization_prompt(article: str, examples: Sequence[tuple[str, str]], dataset: str) -> str:
    """The prompt for an article.

    Args:
        article: to summarise.
        examples: articles with their summaries.
        dataset: one of `SENTENCES`.
    """
    count = SENTENCES[dataset]
    asked = f"Summarize the above article in {count} sentence{'s' if count > 1 else ''}."

    def block(text: str) -> str:
        return f"{STOP}\nArticle: {text}\n\n{asked}\n"

    return "".join(f"{block(text)}{summary}\n\n" for text, summary in examples) + block(article)
