// Loaded with LD_PRELOAD: the backend is there before a program asks what there is.
#include "ggml-backend.h"
#include "ggml-rpc.h"

__attribute__((constructor)) static void register_rpc() {
    ggml_backend_register(ggml_backend_rpc_reg());
}
