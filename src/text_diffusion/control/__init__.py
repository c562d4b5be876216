"""Steering: demands on words, infilling, editing, guidance by classifiers and by any differentiable score.

    from text_diffusion.control import Avoid, Length, Template, Want
    model.sample(10, controls=[Template("The [GAP] apple is [GAP]."), Avoid("rotten")])

Controls compose: demands on words are met together and without exception, gradients of scores add up. How is in
`steering`; the other modules, leaf first: `vocabulary`, `template`, `automaton`, `posterior`, `controls`.
"""

from __future__ import annotations

from text_diffusion.control.classifier import Classifier, Label
from text_diffusion.control.controls import Avoid, Control, Edit, Length, Scorer, Template, Want
from text_diffusion.control.given import Labelled, Sources
from text_diffusion.control.steering import InnerSteps

__all__ = [
    "Avoid",
    "Classifier",
    "Control",
    "Edit",
    "InnerSteps",
    "Label",
    "Labelled",
    "Length",
    "Scorer",
    "Sources",
    "Template",
    "Want",
]
