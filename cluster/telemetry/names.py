"""The names of spans and their attributes. OpenTelemetry's conventions for generative AI (gen_ai.*) are not stable yet:
they stand here alone, so that a change of theirs is one of this file."""

from typing import Final

# Of one call of a model.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"

# Of HTTP and gRPC.
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
RPC_SYSTEM: Final = "rpc.system"
RPC_METHOD: Final = "rpc.method"
ERROR_TYPE: Final = "error.type"

# Ours.
REQUEST_ID: Final = "remuda.request_id"
TENANT: Final = "remuda.tenant"
OUTCOME: Final = "remuda.outcome"
FIRST_TOKEN_S: Final = "remuda.time_to_first_token_s"
NUM_SEQUENCES: Final = "remuda.num_sequences"
REPLICA: Final = "remuda.replica"
ATTEMPT: Final = "remuda.attempt"
NUM_TOKENS_BEFORE: Final = "remuda.num_tokens_before"
NUM_TOKENS: Final = "remuda.num_tokens"
FINISH_REASON: Final = "remuda.finish_reason"
NUM_STEPS: Final = "remuda.num_steps"
STEP_MS: Final = "remuda.step_ms"
RANK_STEP_MS: Final = "remuda.rank_step_ms"
SLOWEST_RANK: Final = "remuda.slowest_rank"

# Spans.
ADMISSION: Final = "admission"
TOKENIZE: Final = "tokenize"
TOKEN_BUDGET: Final = "token budget"
ROUTE: Final = "route"
ATTEMPT_SPAN: Final = "attempt"
SEQUENCE: Final = "sequence"
QUEUE: Final = "queue"
PREFILL: Final = "prefill"
DECODE: Final = "decode"

# Events.
LOST: Final = "lost"
