"""One verification rule per file: which path did the target take?"""
