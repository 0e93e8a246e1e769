"""What to do about each error code, in one sentence; docs/output.md says more."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import ErrorCode

REMEDIES: Mapping[ErrorCode, str] = {
    ErrorCode.INVALID_JSON_LINE: "Mend the line: it has to be one JSON object in UTF-8.",
    ErrorCode.MISSING_REQUIRED_PARAMETER: "Add what the message names to the line.",
    ErrorCode.INVALID_METHOD: 'Set the line\'s method to "POST".',
    ErrorCode.INVALID_URL: "Set the line's url to one of the two endpoints the message names.",
    ErrorCode.MODEL_NOT_FOUND: (
        "Correct the line's model, or add the name to the profile's served_model_name."
    ),
    ErrorCode.INVALID_MESSAGES: "Mend the row's prompt or messages as the message says.",
    ErrorCode.INVALID_PARAMETER: "Mend the parameter that the message names; it gives the range.",
    ErrorCode.DUPLICATE_CUSTOM_ID: "Give each row its own custom_id; the first of them was run.",
    ErrorCode.IMAGE_NOT_FOUND: "Put the image where the row says, or correct its URI.",
    ErrorCode.IMAGE_INVALID: "Convert the image to PNG, JPEG or WebP, or replace it.",
    ErrorCode.IMAGE_TOO_LARGE: (
        "Shrink the image, or raise limits.max_image_bytes or limits.max_image_pixels."
    ),
    ErrorCode.IMAGE_FORBIDDEN: (
        "Allow the place with images.roots or images.domains, or put the image's bytes into the "
        "row."
    ),
    ErrorCode.TEMPLATE_ERROR: "Mend the row, or let the template ask for what it may lack.",
    ErrorCode.IMAGE_FETCH_FAILED: "Run the job again with --retry image_fetch_failed.",
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: (
        "Shorten the prompt, or raise max_model_len in engine.overrides."
    ),
    ErrorCode.LENGTH: "Raise max_completion_tokens and run the job again with --retry length.",
    ErrorCode.SCHEMA_VIOLATION: (
        "Mend the row's schema or stop strings, or try once more with --retry schema_violation."
    ),
    ErrorCode.ENGINE_REJECTED: "Change the row as the engine's message says.",
    ErrorCode.ENGINE_ERROR: (
        "Run the job again with --retry engine_error; if that fails too, the engine's log says why."
    ),
    ErrorCode.ENGINE_FATAL: (
        "The row kills the engine: change it or the engine, then --retry engine_fatal."
    ),
    ErrorCode.TIMEOUT: "Raise limits.row_timeout_s and run the job again with --retry timeout.",
    ErrorCode.BATCH_EXPIRED: (
        "The deadline passed first: run the job again with --retry expired and a later one."
    ),
    ErrorCode.INTERNAL_ERROR: "A defect of this program: please report it with the driver's log.",
}
