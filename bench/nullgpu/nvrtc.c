// A libnvrtc.so.13 that compiles nothing, for the few operators that PyTorch compiles when they are first used. It is
// found by its name, so it has to be a library of its own.
#include <stddef.h>

static int program;
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
const char *nvrtcGetErrorString(int error) { return "null GPU"; }
int nvrtcCreateProgram(void **made, const char *source, const char *name, int count, const char **headers,
                       const char **includes) {
    *made = &program;
    return 0;
}
int nvrtcDestroyProgram(void **made) { return 0; }
int nvrtcAddNameExpression(void *made, const char *expression) { return 0; }
int nvrtcCompileProgram(void *made, int count, const char **options) { return 0; }
int nvrtcGetLoweredName(void *made, const char *expression, const char **name) { *name = "nothing"; return 0; }
int nvrtcGetCUBINSize(void *made, size_t *size) { *size = 1; return 0; }
int nvrtcGetPTXSize(void *made, size_t *size) { *size = 1; return 0; }
int nvrtcGetProgramLogSize(void *made, size_t *size) { *size = 1; return 0; }
int nvrtcGetCUBIN(void *made, char *code) { *code = 0; return 0; }
int nvrtcGetPTX(void *made, char *code) { *code = 0; return 0; }
int nvrtcGetProgramLog(void *made, char *text) { *text = 0; return 0; }
