"""In the path of a measured driver: `kubernetes` imports this development package where it finds it, 3 MB (measured).

No image has it, so no figure should.
"""

raise ImportError("kubernetes-validate is not part of what is measured")
