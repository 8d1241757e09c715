"""Tiers `stream` and `stream_fp8`: layers by chunks of tokens.

tier       the node of autograd, and its passes over the chunks
keys       keys and values that grow from chunk to chunk, and their gradients
attention  a chunk's queries and all keys before them
masks      masks by blocks
able       which layers can be streamed
"""
