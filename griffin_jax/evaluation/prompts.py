"""The prompt format of GRIFFIN's summarisation experiments: examples with their summaries, then the article."""

from __future__ import annotations

from collections.abc import Sequence

STOP = "###"
"""The mark that begins the next example, and so ends an answer."""

SENTENCES = {"xsum": 1, "cnn": 3}
"""The number of sentences that the prompt asks for, for each dataset."""


def summarization_prompt(article: str, examples: Sequence[tuple[str, str]], dataset: str) -> str:
    """The prompt for an article.

    Args:
        article: the article to summarise.
        examples: articles with their summaries.
        dataset: name of a dataset in `SENTENCES`.
    """
    count = SENTENCES[dataset]
    asked = f"Summarize the above article in {count} sentence{'s' if count > 1 else ''}."

    def block(text: str) -> str:
        return f"{STOP}\nArticle: {text}\n\n{asked}\n"

    return "".join(f"{block(text)}{summary}\n\n" for text, summary in examples) + block(article)
