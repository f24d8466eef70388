"""Codecs for pseudogradients: encoders, decoders and their packed payloads."""
