"""What a wrong request raises."""

from vllm.exceptions import VLLMValidationError


class RequestError(VLLMValidationError, ValueError):
    """A fault in a request: HTTP 400 from the server, and a ValueError to a caller of `LLM`."""

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter, value=value)
