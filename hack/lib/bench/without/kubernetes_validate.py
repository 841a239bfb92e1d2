"""On the path of a measured driver. `kubernetes` imports this development package if it finds it: 3 MB (measured).

No image has the package, so no figure may include it.
"""

raise ImportError("kubernetes-validate is not part of what is measured")
