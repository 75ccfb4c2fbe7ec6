"""The catalogue: architecture facts of models with their sources, and where weights lie."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class Model(models.Model):
    """Facts only; ``None`` where nobody could source one. ``kv`` describes the cache per layer group
    as ``data/models.json`` does (kind, layers, kv_heads, head_dim, bytes_per_token_bf16)."""

    slug = models.SlugField(max_length=100, unique=True)
    name = models.CharField(max_length=200)
    hf_repo = models.CharField(max_length=200, blank=True)
    checkpoint = models.CharField(
        max_length=300, blank=True, help_text="What the engine loads: a hub repository, folder or file."
    )
    checkpoint_note = models.TextField(blank=True)
    architecture = models.CharField(max_length=100, blank=True)
    licence = models.CharField(max_length=100, blank=True)
    params_total = models.BigIntegerField(null=True, blank=True)
    params_active = models.BigIntegerField(null=True, blank=True)
    layers = models.IntegerField(null=True, blank=True)
    hidden_size = models.IntegerField(null=True, blank=True)
    attention_heads = models.IntegerField(null=True, blank=True)
    kv_heads = models.IntegerField(null=True, blank=True)
    head_dim = models.IntegerField(null=True, blank=True)
    intermediate_size = models.IntegerField(null=True, blank=True)
    vocab_size = models.IntegerField(null=True, blank=True)
    experts = models.IntegerField(null=True, blank=True)
    experts_per_token = models.IntegerField(null=True, blank=True)
    max_context_tokens = models.IntegerField(null=True, blank=True)
    attention_type = models.CharField(max_length=200, blank=True)
    kv = models.JSONField(default=dict, blank=True)
    quantization = models.CharField(max_length=200, blank=True)
    weights_bytes = models.BigIntegerField(null=True, blank=True)
    weights_formula = models.CharField(max_length=200, blank=True)
    tool_parser = models.CharField(max_length=40, blank=True)
    reasoning_parser = models.CharField(max_length=40, blank=True)
    chat_template = models.CharField(max_length=40, blank=True)
    sources = models.JSONField(default=list, blank=True)
    notes = models.JSONField(default=list, blank=True)
    shipped = models.BooleanField(default=False)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def kv_bytes_per_token(self) -> int | None:
        value = self.kv.get("bytes_per_token_bf16") if isinstance(self.kv, dict) else None
        return int(value) if isinstance(value, int | float) else None


class Weights(models.Model):
    """A model's weights on one rig's disk. ``path`` is what the engine is pointed at: a folder or a GGUF file.

    ``repo`` and ``revision`` (a commit) say where the panel downloaded them from; both empty for what a person
    registered and for what an engine install brought."""

    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="weights")
    rig_name = models.CharField(max_length=63)
    path = models.CharField(max_length=500)
    size_bytes = models.BigIntegerField(null=True)
    kind = models.CharField(max_length=16, blank=True)  # safetensors, gguf, pytorch
    quantization = models.CharField(max_length=40, blank=True)
    repo = models.CharField(max_length=200, blank=True)
    revision = models.CharField(max_length=64, blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["model", "rig_name"], name="one_copy_of_weights_per_rig")]

    def __str__(self) -> str:
        return f"{self.model} on {self.rig_name}"
