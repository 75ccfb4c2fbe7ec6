"""How higher apps tell the catalogue what uses a model and whether it fits a rig: connect in ``AppConfig.ready``."""

from __future__ import annotations

from django.dispatch import Signal

model_fits = Signal()  # models, rig; a receiver answers with {model id: (word, sentence)}
model_boots = Signal()  # model, rig; a receiver answers with what templates/deployments/partials/boots.html shows
model_usage = Signal()  # model; a receiver answers with an iterable of selectors.Usage
weights_usage = Signal()  # rig_name, path; a receiver answers with an iterable of selectors.Usage: what needs it
