"""Preference training: losses of log-probabilities, reference models in less memory, a pair's prompt computed once.

losses     pure functions, and the one table that names them
reference  how a frozen model is had: whole, quantised, precomputed, as an adapter, not at all
sharing    a pair's prompt in one forward pass for both answers
collate    what a batch of pairs holds beside its tokens
"""
