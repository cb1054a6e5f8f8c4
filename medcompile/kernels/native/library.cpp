// What the library shows: the operators for ONNX Runtime (RegisterCustomOps), and plain calls for tests.
#include <algorithm>
#include <string>
#include <vector>

#include "attention.h"
#include "onnxruntime.h"
#include "products.h"
#include "self_attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Isa kIsa = best_isa();

// Where a call of the interface fails, what it says is handed on.
#define TRY(call)                               \
  do {                                          \
    if (ort::Status* status = (call)) return status; \
  } while (false)

ort::Status* input(const ort::Api& api, ort::KernelContext* context, size_t index, void** data,
                   std::vector<int64_t>* dims) {
  const ort::Value* value = nullptr;
  TRY(api.KernelContext_GetInput(context, index, &value));
  TRY(api.GetTensorMutableData(const_cast<ort::Value*>(value), data));
  ort::Shape* shape = nullptr;
  TRY(api.GetTensorTypeAndShape(value, &shape));
  size_t count = 0;
  ort::Status* status = api.GetDimensionsCount(shape, &count);
  if (status == nullptr) {
    dims->resize(count);
    status = api.GetDimensions(shape, dims->data(), count);
  }
  api.ReleaseTensorTypeAndShapeInfo(shape);
  return status;
}

template <typename F>
ort::Status* parallel(const ort::Api& api, ort::KernelContext* context, size_t total, F run) {
  if (total == 1) {
    run(0);
    return nullptr;
  }
  const auto call = [](void* data, size_t i) { (*static_cast<F*>(data))(i); };
  return api.KernelContext_ParallelFor(context, call, total, 0, &run);
}

// ---- products of x [..., k] float32 with packed weights uint8 [tiles, bytes] of 4 or 8 bits -> [..., n] float32
//
//   MatMulInt4, MatMulInt8              x . weights
//   GatedMatMulInt4, GatedMatMulInt8    silu(x . gate) * (x . up)
//   BiasedMatMulInt4, BiasedMatMulInt8  x . weights + bias [n]; through Gelu if `gelu` is 1

enum Form { kPlain, kGated, kBiased };

template <int kBits, Form kForm>
struct Product {
  const ort::Api* api;
  products::Shape shape;
  bool gelu;

  static constexpr const char* kNames[2][3] = {{"MatMulInt4", "GatedMatMulInt4", "BiasedMatMulInt4"},
                                               {"MatMulInt8", "GatedMatMulInt8", "BiasedMatMulInt8"}};
  static constexpr const char* kName = kNames[kBits / 8][kForm];
  static constexpr size_t kInputs = kForm == kPlain ? 2 : 3;
  static ort::Type type(size_t index) {
    return index == 0 || (index == 2 && kForm == kBiased) ? ort::kFloat : ort::kUint8;
  }

  ort::Status* create(const ort::KernelInfo* info) {
    int64_t k = 0, n = 0, group = 0, through = 0;
    TRY(api->KernelInfoGetAttribute_int64(info, "K", &k));
    TRY(api->KernelInfoGetAttribute_int64(info, "N", &n));
    TRY(api->KernelInfoGetAttribute_int64(info, "block_size", &group));
    if (kForm == kBiased) TRY(api->KernelInfoGetAttribute_int64(info, "gelu", &through));
    if (k <= 0 || n <= 0 || k > products::kMaxGroup || group < 16 || group % 16 != 0 || k % group != 0) {
      return api->CreateStatus("a product's K must be a multiple of block_size, and that one of 16");
    }
    shape = {kBits, static_cast<int>(k), static_cast<int>(n), static_cast<int>(group)};
    gelu = through != 0;
    return nullptr;
  }

  ort::Status* compute(ort::KernelContext* context) const {
    void *x = nullptr, *given[2] = {nullptr, nullptr}, *y = nullptr;
    std::vector<int64_t> dims, sizes;
    TRY(input(*api, context, 0, &x, &dims));
    if (dims.empty() || dims.back() != shape.k) return api->CreateStatus("a product's input has another last size than K");
    for (size_t i = 1; i < kInputs; i++) {
      TRY(input(*api, context, i, &given[i - 1], &sizes));
      const bool weights = sizes.size() == 2 && sizes[0] == shape.tiles() &&
                           sizes[1] == static_cast<int64_t>(shape.tile_bytes());
      const bool fits = type(i) == ort::kUint8 ? weights : sizes.size() == 1 && sizes[0] == shape.n;
      if (!fits) return api->CreateStatus("a product's weights are not packed for its K, N and block_size");
    }
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims.size(); i++) rows *= dims[i];
    dims.back() = shape.n;
    ort::Value* out = nullptr;
    TRY(api->KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &out));
    TRY(api->GetTensorMutableData(out, &y));
    if (rows == 0) return nullptr;

    products::Finish finish;
    if (kForm == kGated) finish.up = static_cast<const uint8_t*>(given[1]);
    if (kForm == kBiased) finish.bias = static_cast<const float*>(given[1]);
    finish.gelu = gelu;
    const int m = static_cast<int>(rows), groups = shape.groups();
    thread_local std::vector<int8_t> a;
    thread_local std::vector<float> step;
    thread_local std::vector<int32_t> offset;
    a.resize(std::max(a.size(), static_cast<size_t>(m) * shape.k));
    step.resize(std::max(step.size(), static_cast<size_t>(m) * groups));
    offset.resize(step.size());
    const products::Rounded rounded{a.data(), step.data(), offset.data()};
    const auto* from = static_cast<const float*>(x);
    const size_t panels = (m + products::kRows - 1) / products::kRows;
    const auto round = [&](size_t i) {
      const int first = static_cast<int>(i) * products::kRows;
      products::round_rows(kIsa, from, m, first, std::min(m, first + products::kRows), shape, rounded);
    };
    if (m <= products::kRows) {
      round(0);
    } else {
      TRY(parallel(*api, context, panels, round));
    }
    // Small enough parts that threads end together, large enough that each reads memory in order for a while.
    const int tiles = shape.tiles(), part = std::max(1, std::min(16, tiles / 16));
    return parallel(*api, context, (tiles + part - 1) / part, [&](size_t i) {
      const int first = static_cast<int>(i) * part;
      products::multiply(kIsa, rounded, m, shape, static_cast<const uint8_t*>(given[0]), finish, first,
                         std::min(tiles, first + part), static_cast<float*>(y));
    });
  }
};

// ---- SelfAttention, MaskedSelfAttention: self_attention.h; qkv [batch, tokens, 3 * heads * width], and the mask, of
// batch * tokens numbers

template <bool kMasked>
struct SelfAttention {
  const ort::Api* api;
  self_attention::Batch batch;

  static constexpr const char* kName = kMasked ? "MaskedSelfAttention" : "SelfAttention";
  static constexpr size_t kInputs = kMasked ? 2 : 1;
  static ort::Type type(size_t) { return ort::kFloat; }

  ort::Status* create(const ort::KernelInfo* info) {
    int64_t heads = 0, width = 0, bfloat16 = 0;
    TRY(api->KernelInfoGetAttribute_int64(info, "heads", &heads));
    TRY(api->KernelInfoGetAttribute_int64(info, "head_dim", &width));
    TRY(api->KernelInfoGetAttribute_int64(info, "bfloat16", &bfloat16));
    TRY(api->KernelInfoGetAttribute_float(info, "scale", &batch.scale));
    if (heads <= 0 || width <= 0 || width > self_attention::kMaxWidth) {
      return api->CreateStatus("SelfAttention: heads of 1 to 256 numbers each");
    }
    batch.heads = static_cast<int>(heads);
    batch.width = static_cast<int>(width);
    batch.bfloat16 = bfloat16 != 0;
    return nullptr;
  }

  ort::Status* compute(ort::KernelContext* context) const {
    void *qkv = nullptr, *mask = nullptr, *out = nullptr;
    std::vector<int64_t> dims, sizes;
    TRY(input(*api, context, 0, &qkv, &dims));
    const int64_t all = static_cast<int64_t>(batch.heads) * batch.width;
    if (dims.size() != 3 || dims[2] != 3 * all) return api->CreateStatus("SelfAttention: not [batch, tokens, 3 * heads * width]");
    if (kMasked) {
      TRY(input(*api, context, 1, &mask, &sizes));
      int64_t count = 1;
      for (const int64_t size : sizes) count *= size;
      if (count != dims[0] * dims[1]) return api->CreateStatus("SelfAttention: the mask is not one number per token");
    }
    dims[2] = all;
    ort::Value* value = nullptr;
    TRY(api->KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &value));
    TRY(api->GetTensorMutableData(value, &out));
    if (dims[0] * dims[1] == 0) return nullptr;
    self_attention::Batch b = batch;
    b.qkv = static_cast<const float*>(qkv);
    b.mask = static_cast<const float*>(mask);
    b.tokens = static_cast<int>(dims[1]);
    b.out = static_cast<float*>(out);
    return parallel(*api, context, static_cast<size_t>(dims[0]) * b.heads, [&](size_t i) {
      self_attention::attend(kIsa, b, static_cast<int>(i) / b.heads, static_cast<int>(i) % b.heads);
    });
  }
};

// ---- PagedAttention: attention.h says what it takes, in the order q, k, v, k_pool, v_pool, starts, past, table

struct PagedAttention {
  const ort::Api* api;
  attention::Batch batch;

  static constexpr const char* kName = "PagedAttention";
  static constexpr size_t kInputs = 8;
  static ort::Type type(size_t index) {
    if (index < 3) return ort::kFloat;
    return index < 5 ? static_cast<ort::Type>(0) : ort::kInt32;  // pools: of either type
  }

  ort::Status* create(const ort::KernelInfo* info) {
    int64_t kv_heads = 0, group = 0, width = 0, window = 0, bfloat16 = 0;
    TRY(api->KernelInfoGetAttribute_int64(info, "kv_heads", &kv_heads));
    TRY(api->KernelInfoGetAttribute_int64(info, "group", &group));
    TRY(api->KernelInfoGetAttribute_int64(info, "head_dim", &width));
    TRY(api->KernelInfoGetAttribute_int64(info, "sliding_window", &window));
    TRY(api->KernelInfoGetAttribute_int64(info, "bfloat16", &bfloat16));
    TRY(api->KernelInfoGetAttribute_float(info, "scale", &batch.scale));
    if (kv_heads <= 0 || group <= 0 || width <= 0 || width > attention::kMaxWidth || window < 0) {
      return api->CreateStatus("PagedAttention: heads of 1 to 256 numbers each");
    }
    batch.kv_heads = static_cast<int>(kv_heads);
    batch.group = static_cast<int>(group);
    batch.width = static_cast<int>(width);
    batch.window = static_cast<int>(window);
    batch.bfloat16 = bfloat16 != 0;
    return nullptr;
  }

  ort::Status* compute(ort::KernelContext* context) const {
    void* data[kInputs];
    std::vector<int64_t> dims[kInputs];
    for (size_t i = 0; i < kInputs; i++) TRY(input(*api, context, i, &data[i], &dims[i]));
    attention::Batch b = batch;
    b.q = static_cast<const float*>(data[0]);
    b.k = static_cast<const float*>(data[1]);
    b.v = static_cast<const float*>(data[2]);
    b.k_pool = data[3];
    b.v_pool = data[4];
    b.starts = static_cast<const int32_t*>(data[5]);
    b.past = static_cast<const int32_t*>(data[6]);
    b.table = static_cast<const int32_t*>(data[7]);
    b.sequences = static_cast<int>(dims[6][0]);
    b.table_width = static_cast<int>(dims[7][1]);
    if (dims[0].size() != 2 || dims[0][1] != static_cast<int64_t>(b.kv_heads) * b.group * b.width ||
        dims[1][1] != static_cast<int64_t>(b.kv_heads) * b.width || dims[3][1] != b.kv_heads ||
        dims[3][3] != attention::kBlock || dims[5][0] != b.sequences + 1) {
      return api->CreateStatus("PagedAttention: sizes of the inputs do not fit each other");
    }
    void* out = nullptr;
    ort::Value* value = nullptr;
    TRY(api->KernelContext_GetOutput(context, 0, dims[0].data(), 2, &value));
    TRY(api->GetTensorMutableData(value, &out));
    b.out = static_cast<float*>(out);
    attention::write(b, 0, static_cast<int>(dims[0][0]));
    return parallel(*api, context, static_cast<size_t>(attention::tiles(b)) * b.kv_heads, [&](size_t i) {
      attention::attend(kIsa, b, static_cast<int>(i) / b.kv_heads, static_cast<int>(i) % b.kv_heads);
    });
  }
};

// ---- an operator as ONNX Runtime wants it described

template <typename Op>
ort::CustomOp describe() {
  ort::CustomOp op;
  op.GetName = [](const ort::CustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const ort::CustomOp*, size_t index) { return Op::type(index); };
  op.GetInputTypeCount = [](const ort::CustomOp*) { return Op::kInputs; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };   // required
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };  // required
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };       // the default
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    Op* made = new Op{};
    made->api = api;
    ort::Status* status = made->create(info);
    if (status != nullptr) {
      delete made;
    } else {
      *kernel = made;
    }
    return status;
  };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return static_cast<const Op*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  return op;
}

const ort::CustomOp kOperators[] = {
    describe<Product<4, kPlain>>(), describe<Product<4, kGated>>(), describe<Product<4, kBiased>>(),
    describe<Product<8, kPlain>>(), describe<Product<8, kGated>>(), describe<Product<8, kBiased>>(),
    describe<PagedAttention>(),     describe<SelfAttention<false>>(), describe<SelfAttention<true>>()};

}  // namespace

EXPORT ort::Status* RegisterCustomOps(ort::Session* options, const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kVersion);
  static ort::Domain* domain = nullptr;  // lives as long as the sessions that it is added to: as the process
  static ort::Status* failed = nullptr;
  static const bool once = [api] {
    failed = api->CreateCustomOpDomain("medcompile.native", &domain);
    for (const ort::CustomOp& op : kOperators) {
      if (failed == nullptr) failed = api->CustomOpDomain_Add(domain, &op);
    }
    return true;
  }();
  static_cast<void>(once);
  return failed != nullptr ? failed : api->AddCustomOpDomain(options, domain);
}

EXPORT int medcompile_best_isa() { return kIsa; }

// x: [m, k]; y: [m, n]; up, bias: null for a product without. One thread.
EXPORT void medcompile_product(int isa, int bits, const float* x, int m, int k, int n, int block_size,
                               const uint8_t* weights, const uint8_t* up, const float* bias, int gelu, float* y) {
  const products::Shape shape{bits, k, n, block_size};
  std::vector<int8_t> a(static_cast<size_t>(m) * k);
  std::vector<float> step(static_cast<size_t>(m) * shape.groups());
  std::vector<int32_t> offset(step.size());
  const products::Rounded rounded{a.data(), step.data(), offset.data()};
  products::Finish finish;
  finish.up = up;
  finish.bias = bias;
  finish.gelu = gelu != 0;
  products::round_rows(static_cast<Isa>(isa), x, m, 0, m, shape, rounded);
  products::multiply(static_cast<Isa>(isa), rounded, m, shape, weights, finish, 0, shape.tiles(), y);
}

EXPORT void medcompile_self_attention(int isa, const float* qkv, const float* mask, int sequences, int tokens, int heads,
                                      int width, float scale, int bfloat16, float* out) {
  const self_attention::Batch batch{qkv, mask, tokens, heads, width, scale, bfloat16 != 0, out};
  for (int i = 0; i < sequences * heads; i++) {
    self_attention::attend(static_cast<Isa>(isa), batch, i / heads, i % heads);
  }
}

EXPORT void medcompile_paged_attention(int isa, const float* q, const float* k, const float* v, void* k_pool,
                                       void* v_pool, int bfloat16, const int32_t* starts, const int32_t* past,
                                       const int32_t* table, int sequences, int table_width, int kv_heads, int group,
                                       int width, int window, float scale, float* out) {
  const attention::Batch batch{q,     k,         v,           k_pool,   v_pool, bfloat16 != 0, starts, past,
                               table, sequences, table_width, kv_heads, group,  width,         window, scale, out};
  attention::write(batch, 0, starts[sequences]);
  for (int tile = 0; tile < attention::tiles(batch); tile++) {
    for (int head = 0; head < kv_heads; head++) attention::attend(static_cast<Isa>(isa), batch, tile, head);
  }
}
