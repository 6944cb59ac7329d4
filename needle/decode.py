"""Hedge."""
class Decoder:
    def __init__(self,*a,**k): pass
    def decode(self,b): return []
