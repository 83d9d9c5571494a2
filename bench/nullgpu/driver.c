// A libcuda.so.1 that does nothing, for Triton's launches: modules load, launches are counted in nullgpu_driver_launches.
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

long nullgpu_driver_launches;
static int something, processors = 132;
static int major = 9, minor = 0;
static size_t shared = 232448, total = 84929019904ull;

__attribute__((constructor)) static void read_environment(void) {
    const char *text;
    if ((text = getenv("NULLGPU_CAPABILITY"))) sscanf(text, "%d.%d", &major, &minor);
    if ((text = getenv("NULLGPU_SHARED"))) shared = atoll(text);
    if ((text = getenv("NULLGPU_PROCESSORS"))) processors = atoi(text);
    if ((text = getenv("NULLGPU_MEMORY"))) total = atoll(text);
}

#define OK return CUDA_SUCCESS
CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; OK; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; OK; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    const char *text = getenv("NULLGPU_NAME");
    snprintf(name, size, "%s", text ? text : "null GPU");
    OK;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = processors; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 1;
    }
    OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)&something; OK; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    OK;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&something; OK; }
CUresult cuCtxSetCurrent(CUcontext context) { OK; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
CUresult cuCtxSynchronize(void) { OK; }
CUresult cuMemGetInfo(size_t *free, size_t *all) { *free = *all = total; OK; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(uint64_t *)value = pointer;
    OK;
}
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { *context = (CUcontext)&something; OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "null GPU"; OK; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "null GPU"; OK; }

static CUresult module(CUmodule *made) { *made = (CUmodule)&something; OK; }
CUresult cuModuleLoad(CUmodule *made, const char *path) { return module(made); }
CUresult cuModuleLoadData(CUmodule *made, const void *image) { return module(made); }
CUresult cuModuleLoadDataEx(CUmodule *made, const void *image, unsigned n, CUjit_option *o, void **v) {
    return module(made);
}
CUresult cuModuleUnload(CUmodule made) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule made, const char *name) {
    *function = (CUfunction)&something;
    OK;
}
CUresult cuFuncGetName(const char **name, CUfunction function) { *name = "null"; OK; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    OK;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t bytes) {
    *count = 2;
    OK;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    nullgpu_driver_launches++;
    OK;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned bytes, CUstream stream, void **arguments, void **extra) {
    nullgpu_driver_launches++;
    OK;
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned bytes, CUstream stream, void **arguments) {
    nullgpu_driver_launches++;
    OK;
}
