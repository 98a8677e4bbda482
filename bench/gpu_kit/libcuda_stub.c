/* The functions of libcuda.so.1 that Triton's launchers link to, for a machine without a GPU: all succeed, none works. */
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuCtxGetCurrent(void) { return 0; }
int cuCtxGetLimit(void) { return 0; }
int cuCtxPopCurrent(void) { return 0; }
int cuCtxPushCurrent(void) { return 0; }
int cuCtxSetCurrent(void) { return 0; }
int cuCtxSetLimit(void) { return 0; }
int cuDeviceGet(void) { return 0; }
int cuDeviceGetAttribute(void) { return 0; }
int cuDevicePrimaryCtxRetain(void) { return 0; }
int cuFuncGetAttribute(void) { return 0; }
int cuFuncLoad(void) { return 0; }
int cuFuncSetAttribute(void) { return 0; }
int cuFuncSetCacheConfig(void) { return 0; }
int cuLaunchKernelEx(void) { return 0; }
int cuModuleGetFunction(void) { return 0; }
int cuModuleLoadData(void) { return 0; }
int cuOccupancyMaxActiveClusters(void) { return 0; }
int cuPointerGetAttribute(void) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
