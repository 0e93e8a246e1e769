"""Every error this project raises, as one tree.

    PipelineError
    ├── UsageError (also ValueError)   the user can mend it; nothing was started   exit 2
    │   ├── ConfigError                the YAML file, an override or an engine profile
    │   ├── InputError                 the input cannot be found or read
    │   ├── CapacityError              the cluster cannot hold the replicas asked for
    │   └── RunMismatchError           the output folder holds a different run, or a damaged one
    ├── StorageError                   an object could not be read or written      exit 1
    │   └── StorageUnavailableError    for want of an answer: it may do later
    ├── RunBusyError                   another driver has the run                  exit 1
    ├── LeaseLostError                 another driver took the run over            exit 1
    ├── EngineError                    an engine could not start, or died          exit 1
    │   └── EngineRefusalError         it refuses its arguments: no retry helps
    ├── AccountingError                rows in and rows out do not add up          exit 1
    └── RowError                       one row's failure: becomes that row's record
        └── TransientRowError          another attempt may succeed

Classes are picklable (they cross process borders inside Ray): every constructor argument is
handed to ``Exception.__init__`` unchanged.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Process exit codes of every job (contract)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    OVER_ERROR_RATE = 3
    INTERRUPTED = 75


class ErrorCode(StrEnum):
    """``error_code`` of a record that did not succeed; docs/output.md explains each."""

    INVALID_JSON_LINE = "invalid_json_line"
    MISSING_REQUIRED_PARAMETER = "missing_required_parameter"
    INVALID_METHOD = "invalid_method"
    INVALID_URL = "invalid_url"
    MODEL_NOT_FOUND = "model_not_found"
    INVALID_MESSAGES = "invalid_messages"
    INVALID_PARAMETER = "invalid_parameter"
    TEMPLATE_ERROR = "template_error"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_INVALID = "image_invalid"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_FETCH_FAILED = "image_fetch_failed"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    LENGTH = "length"
    SCHEMA_VIOLATION = "schema_violation"
    ENGINE_REJECTED = "engine_rejected"
    ENGINE_ERROR = "engine_error"
    ENGINE_FATAL = "engine_fatal"
    TIMEOUT = "timeout"
    BATCH_EXPIRED = "batch_expired"
    INTERNAL_ERROR = "internal_error"


class PipelineError(Exception):
    """Root of the tree."""

    exit_code = ExitCode.FAILED


class UsageError(PipelineError, ValueError):
    """Something the user can mend; raised before anything is started or written."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """The job's YAML, a ``--set`` override, or an engine profile is wrong."""


class InputError(UsageError):
    """The input cannot be found, reached or read, or its columns do not fit."""


class CapacityError(UsageError):
    """The cluster cannot hold the replicas the run asks for."""


class RunMismatchError(UsageError):
    """The output folder holds a run with other input, model, seed or sampling, or a damaged one."""


class StorageError(PipelineError):
    """An object could not be listed, read or written."""


class StorageUnavailableError(StorageError):
    """The store gave no answer, or one that says later; the same request may do in a while."""


class RunBusyError(PipelineError):
    """Another driver, which is alive, has the lease of the run."""


class LeaseLostError(PipelineError):
    """The run's lease is no longer ours: another driver may be writing to the run."""


class EngineError(PipelineError):
    """An engine could not be started, or died while rows were in flight."""


class EngineRefusalError(EngineError):
    """An engine refuses its arguments or its model; starting it again would end the same way."""


class AccountingError(PipelineError):
    """Rows in and rows out do not add up; no ``_SUCCESS`` is written."""


class RowError(PipelineError):
    """One row cannot be completed. ``code`` and ``message`` go into its record."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class TransientRowError(RowError):
    """An engine failed at one row and goes on; another attempt at the row may succeed."""
