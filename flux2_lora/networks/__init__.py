"""The neural networks that families are composed of: transformers, autoencoders, text encoders."""
