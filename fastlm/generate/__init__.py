"""Generation: from a model and ids to new ids. It knows nothing of text.

    for index, id in steps(model, prompts, Settings(max_tokens=32)): ...    # a batch, token by token
    generate(model, prompts, settings) -> [Output(ids, reason), ...]         # the same, collected
    beam_search(model, prompt, beams=4, ...) -> Output
    reading = Reading(model, sources)    # an encoder-decoder model: steps(reading, reading.prompts, ...)
    steps(model, [prompt], settings, past=past)    # of a prompt that goes on from the last one only what is new is read: Past

A prompt gives the same ids, from the same bits, alone and in a batch, at any number of threads.
"""

from fastlm.generate.beam import BeamSettings, beam_search
from fastlm.generate.engine import Output, generate, steps
from fastlm.generate.past import Past
from fastlm.generate.settings import Continues, Settings, ids_of
from fastlm.generate.source import Reading

__all__ = [
    "BeamSettings",
    "Continues",
    "Output",
    "Past",
    "Reading",
    "Settings",
    "beam_search",
    "generate",
    "ids_of",
    "steps",
]
