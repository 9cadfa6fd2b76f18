"""TF-IDF of the responses alone: a loss is taken of a response, and its words tell most of it."""

from airrep.attributors.tfidf import TfidfAttributor
from airrep.examples import Example


class ResponseTfidfAttributor(TfidfAttributor):
    """Cosine of the TF-IDF vectors of two responses; prompts are not read.

    Which answers a language model was trained on often moves the loss of an answer more than the
    questions do; a method that stays behind this one has not earned its language model.
    """

    name = "response_tfidf"

    def _text(self, example: Example) -> str:
        return example.response
