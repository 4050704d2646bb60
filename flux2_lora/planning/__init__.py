"""Will it fit, and how long will it take: from a model's shape and a card to the split of memory that trains fastest.

sketch     what a block keeps, needs and computes, read off the model's own code run on shapes
memory     memory by part at the moment of its peak
schedule   seconds of a step, copies beside computation
hardware   what a card can do: given, or measured here
choose     the split that is fastest among those that fit; alternatives, refusals, corrections
"""
