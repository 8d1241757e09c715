"""Tiers `stream` and `stream_fp8`: layers by chunks of tokens.

tier       a layer's forward
call       one call of it: the passes over its chunks
node       the node of autograd
chains     layers that share one input (`stream/4`)
keys       keys and values that grow from chunk to chunk, and their gradients
attention  a chunk's queries and all keys before them
masks      masks by blocks
documents  what a mask means: documents and a window, for which there is a kernel without masks
able       which layers can be streamed
"""
