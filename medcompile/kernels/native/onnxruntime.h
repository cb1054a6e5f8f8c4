// The few entries of ONNX Runtime's C interface that an operator library needs, by their places in its tables.
//
// The interface only ever grows at its end, so a place keeps its meaning; everything here is there since version 17.
// Names are the interface's own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;

struct Status;
struct Session;  // session options
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;

enum Type : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kBfloat16 = 16 };

using Entry = void (*)();

struct Api {
  Entry entries[512];

  template <typename F>
  F at(size_t place) const {
    return reinterpret_cast<F>(entries[place]);
  }
  Status* CreateStatus(const char* message) const {
    constexpr int kFail = 1;
    return at<Status* (*)(int, const char*)>(0)(kFail, message);
  }
  Status* CreateCustomOpDomain(const char* name, Domain** out) const {
    return at<Status* (*)(const char*, Domain**)>(26)(name, out);
  }
  Status* CustomOpDomain_Add(Domain* domain, const void* op) const {
    return at<Status* (*)(Domain*, const void*)>(27)(domain, op);
  }
  Status* AddCustomOpDomain(Session* options, Domain* domain) const {
    return at<Status* (*)(Session*, Domain*)>(28)(options, domain);
  }
  Status* GetTensorMutableData(Value* value, void** out) const {
    return at<Status* (*)(Value*, void**)>(51)(value, out);
  }
  Status* GetDimensionsCount(const Shape* shape, size_t* out) const {
    return at<Status* (*)(const Shape*, size_t*)>(61)(shape, out);
  }
  Status* GetDimensions(const Shape* shape, int64_t* out, size_t count) const {
    return at<Status* (*)(const Shape*, int64_t*, size_t)>(62)(shape, out, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, Shape** out) const {
    return at<Status* (*)(const Value*, Shape**)>(65)(value, out);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* dims, size_t count,
                                  Value** out) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims, count,
                                                                                        out);
  }
  void ReleaseTensorTypeAndShapeInfo(Shape* shape) const { at<void (*)(Shape*)>(99)(shape); }
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*run)(void*, size_t), size_t total,
                                    size_t batches, void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, run, total, batches, data);
  }
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// One operator, as far as version 17 reads it.
struct CustomOp {
  uint32_t version = kVersion;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char* (*GetName)(const CustomOp*) = nullptr;
  const char* (*GetExecutionProviderType)(const CustomOp*) = nullptr;
  Type (*GetInputType)(const CustomOp*, size_t) = nullptr;
  size_t (*GetInputTypeCount)(const CustomOp*) = nullptr;
  Type (*GetOutputType)(const CustomOp*, size_t) = nullptr;
  size_t (*GetOutputTypeCount)(const CustomOp*) = nullptr;
  void (*KernelCompute)(void*, KernelContext*) = nullptr;
  void (*KernelDestroy)(void*) = nullptr;
  int (*GetInputCharacteristic)(const CustomOp*, size_t) = nullptr;
  int (*GetOutputCharacteristic)(const CustomOp*, size_t) = nullptr;
  int (*GetInputMemoryType)(const CustomOp*, size_t) = nullptr;
  int (*GetVariadicInputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**) = nullptr;
  Status* (*KernelComputeV2)(void*, KernelContext*) = nullptr;
  Status* (*InferOutputShapeFn)(const CustomOp*, void*) = nullptr;
  int (*GetStartVersion)(const CustomOp*) = nullptr;
  int (*GetEndVersion)(const CustomOp*) = nullptr;
};

}  // namespace ort
