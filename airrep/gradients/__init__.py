"""Gradients of a language model, example by example: layers, projections, storage, curvature."""
