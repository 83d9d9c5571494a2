// Functions of the CUDA runtime and of cuBLAS that a program calls and that have nothing to do: they succeed. Without
// the headers, whose types of the arguments they ignore.

#define NOTHING(name) int name() { return 0; }
#define EACH(DO) \
    DO(cudaProfilerStart) DO(cudaProfilerStop) DO(cudaHostRegister) DO(cudaHostUnregister) \
    DO(__cudaRegisterFatBinaryEnd) DO(__cudaUnregisterFatBinary) DO(__cudaRegisterFunction) DO(__cudaRegisterVar) \
    DO(cudaDeviceEnablePeerAccess) DO(cudaDeviceGetDefaultMemPool) DO(cudaGraphDebugDotPrint) \
    DO(cudaGraphNodeGetDependencies) DO(cudaIpcCloseMemHandle) DO(cudaIpcGetEventHandle) DO(cudaIpcGetMemHandle) \
    DO(cudaIpcOpenEventHandle) DO(cudaIpcOpenMemHandle) DO(cudaMemPoolGetAttribute) DO(cudaMemPoolSetAccess) \
    DO(cudaMemPoolSetAttribute) DO(cudaMemPoolTrimTo) DO(cudaStreamAddCallback) \
    DO(cublasDestroy_v2) DO(cublasSetMathMode) DO(cublasSetPointerMode_v2) DO(cublasSetStream_v2) \
    DO(cublasSetWorkspace_v2) DO(cublasLtMatmul) DO(cublasLtMatmulDescSetAttribute) \
    DO(cublasLtMatmulPreferenceSetAttribute) DO(cublasLtMatrixLayoutSetAttribute) \
    DO(cublasGemmEx) DO(cublasGemmStridedBatchedEx) DO(cublasSgemmEx) DO(cublasDotEx) \
    DO(cublasSgemm_v2) DO(cublasDgemm_v2) DO(cublasCgemm_v2) DO(cublasZgemm_v2) \
    DO(cublasSgemmStridedBatched) DO(cublasDgemmStridedBatched) DO(cublasCgemmStridedBatched) \
    DO(cublasZgemmStridedBatched) DO(cublasSgemv_v2) DO(cublasDgemv_v2) DO(cublasCgemv_v2) DO(cublasZgemv_v2) \
    DO(cublasSdot_v2) DO(cublasDdot_v2) DO(cublasCdotc_v2) DO(cublasCdotu_v2) DO(cublasZdotc_v2) DO(cublasZdotu_v2) \
    DO(cublasSgelsBatched) DO(cublasDgelsBatched) DO(cublasCgelsBatched) DO(cublasZgelsBatched) \
    DO(cublasSgeqrfBatched) DO(cublasDgeqrfBatched) DO(cublasCgeqrfBatched) DO(cublasZgeqrfBatched) \
    DO(cublasSgetrfBatched) DO(cublasDgetrfBatched) DO(cublasCgetrfBatched) DO(cublasZgetrfBatched) \
    DO(cublasSgetrsBatched) DO(cublasDgetrsBatched) DO(cublasCgetrsBatched) DO(cublasZgetrsBatched) \
    DO(cublasStrsmBatched) DO(cublasDtrsmBatched) DO(cublasCtrsmBatched) DO(cublasZtrsmBatched) \
    DO(cublasStrsm_v2) DO(cublasDtrsm_v2) DO(cublasCtrsm_v2) DO(cublasZtrsm_v2)
EACH(NOTHING)
