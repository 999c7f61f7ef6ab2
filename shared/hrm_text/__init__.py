"""HRM-Text, independent of any engine: recurrence, spans, prompt envelope, oracle.

Importing this package imports neither torch nor an engine; each module says what it needs.
"""

__version__ = "0.1.0"
