"""Lossy codecs for pseudogradients: payload formats, encoders and decoders."""
