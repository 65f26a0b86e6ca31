#include "kernels/moe/moe.h"

#include <vector>

#include "csrc/bind/bind.h"
#include "csrc/runtime/parallel.h"
#include "kernels/int8_matmul/int8_matmul.h"
#include "kernels/matmul/matmul.h"

FASTLM_KERNELS(MoeKernels, moe)
FASTLM_KERNELS(MatmulKernels, matmul)
FASTLM_KERNELS(QuantizedMatmulKernels, quantized_matmul)

namespace fastlm {

const Int8MatmulKernels& int8_kernels();  // csrc/bind/int8_matmul.cpp

namespace {

// Products below this are dealt to the threads whole; larger ones are cut between the threads, one after the other.
constexpr int64_t kWhole = 1 << 26;

template <class Kernels, class Product> void multiply(const Kernels& kernels, Product p) {
    const Workspace workspace(kernels.workspace(p));
    p.workspace = static_cast<float*>(workspace.memory);
    kernels.matmul(p);
}

// f(begin, end) over n products, dealt to the threads. Each is cut as it would be on one thread: the cuts for several, narrow
// groups of columns, cost time and bring nothing here.
template <class F> void deal(int64_t n, const F& f) {
    struct Alone {
        const bool on = num_threads() > 1;
        Alone() {
            if (on) compute_alone(true);
        }
        ~Alone() {
            if (on) compute_alone(false);
        }
    };
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
        const Alone alone;
        f(begin, end);
    });
}

enum class Multiplies : int { plain = 0, quantized = 1, int8 = 2 };

// The weight of one expert, (N, K).
struct Expert {
    const void* weight;
    Multiplies how;
    int type;  // Storage or Quant
};

// y = act(x_e W_e^T): each expert's run of rows, counts[e] of them, which are read when it runs.
struct GroupedLinear {
    float* y;               // (P, N); rows behind the last run are left alone
    float* z;               // (P, N) or null: before the activation
    int64_t* starts;        // (E + 1,) workspace
    const float* x;         // (P, K)
    const int64_t* counts;  // (E,)
    const Expert* experts;  // (E,)
    int64_t P, N, K, E;
    Activation activation;
};

void grouped_linear(const GroupedLinear& p) {
    int64_t used = 0;
    p.starts[0] = 0;
    for (int64_t e = 0; e < p.E; ++e) {
        const int64_t room = p.P - p.starts[e], n = p.counts[e] < 0 ? 0 : p.counts[e] < room ? p.counts[e] : room;
        p.starts[e + 1] = p.starts[e] + n;
        used += n > 0;
    }
    const auto some = [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
            const int64_t row = p.starts[e], M = p.starts[e + 1] - row;
            if (M == 0 || p.N == 0) continue;
            const Expert& expert = p.experts[e];
            float *y = p.y + row * p.N, *z = p.z ? p.z + row * p.N : nullptr;
            const float* x = p.x + row * p.K;
            if (expert.how == Multiplies::plain) {
                Matmul product{y, z, nullptr, x,    expert.weight,        nullptr, nullptr,     1, M, p.N, p.K,
                               0, 0, false,   true, Storage(expert.type), false,   p.activation};
                const bool alike = e + 1 < p.E && (&expert)[1].how == expert.how && (&expert)[1].type == expert.type;
                if (alike) product.b_next = (&expert)[1].weight;
                multiply(matmul_kernels(), product);
                continue;
            }
            const QuantizedMatmul product{y,
                                          z,
                                          nullptr,
                                          x,
                                          static_cast<const uint8_t*>(expert.weight),
                                          nullptr,
                                          nullptr,
                                          M,
                                          p.N,
                                          p.K,
                                          Quant(expert.type),
                                          p.activation};
            if (expert.how == Multiplies::int8) multiply(int8_kernels(), product);
            else multiply(quantized_matmul_kernels(), product);
        }
    };
    const int64_t work = p.starts[p.E] * p.N * p.K;
    if (used < 2 * num_threads() || work / used >= kWhole) some(0, p.E);
    else deal(p.E, some);
}

}  // namespace

void bind_moe(py::module_& m) {
    m.def("moe_route", [](const py::array& probabilities, const py::array& experts, const py::array& weights,
                          const py::array& logits, bool renormalise) {
        const MoeRoute p{f32(probabilities), data<int32_t>(experts), f32(weights),  f32(logits),
                         rows(logits),       last(logits),           last(experts), renormalise};
        launch(moe_kernels().route, p);
    });
    // capacity 0: no limit.
    m.def("moe_places", [](const py::array& slots, const py::array& places, const py::array& counts, const py::array& experts,
                           int64_t groups, int64_t capacity) {
        const MoePlaces p{data<int32_t>(slots),
                          data<int32_t>(places),
                          data<int64_t>(counts),
                          data<int32_t>(experts),
                          rows(experts),
                          last(counts),
                          last(experts),
                          groups,
                          capacity};
        launch(moe_kernels().places, p);
    });
    m.def("moe_gather", [](const py::array& y, const py::array& x, const py::array& indices) {
        const MoeGather p{f32(y), f32(x), data<int32_t>(indices), rows(y), last(y), rows(x)};
        launch(moe_kernels().gather, p);
    });
    m.def("moe_combine", [](const py::array& out, const py::array& y, const py::array& slots, const py::object& weights,
                            const py::object& residual) {
        const MoeCombine p{f32(out),  f32(y),    data<int32_t>(slots), f32(weights), f32(residual),
                           rows(out), last(out), last(slots),          rows(y)};
        launch(moe_kernels().combine, p);
    });
    m.def("moe_combine_backward", [](const py::array& dy, const py::array& dweights, const py::array& dout, const py::array& y,
                                     const py::array& slots, const py::array& weights) {
        const MoeCombineBackward p{f32(dy),      f32(dweights), f32(dout),  f32(y),     data<int32_t>(slots),
                                   f32(weights), rows(dout),    last(dout), last(slots)};
        launch(moe_kernels().combine_backward, p);
    });
    // One product an expert, on counts[e] rows of x. how: 0 for a matrix of Storage type, 1 and 2 for packed blocks of Quant type
    // with float32 or int8 activations.
    m.def("grouped_linear",
          [](const py::array& y, const py::object& z, const py::array& x, const py::array& counts,
             const std::vector<py::array>& weights, const std::vector<int>& how, const std::vector<int>& types, int activation) {
              std::vector<Expert> experts;
              for (size_t e = 0; e < weights.size(); ++e) experts.push_back({data<void>(weights[e]), Multiplies(how[e]), types[e]});
              const int64_t E = int64_t(experts.size());
              const GroupedLinear p{f32(y),    f32(z),    nullptr,   f32(x), data<int64_t>(counts), listed(experts),
                                    dim(y, 0), dim(y, 1), dim(x, 1), E,      Activation(activation)};
              launch(&grouped_linear, p, &GroupedLinear::starts, (E + 1) * int64_t(sizeof(int64_t)));
          });
    // One product a group: c[i] (M_i, N_i) = or += a[i] b[i]. Each has the bits that matmul gives it alone.
    m.def("grouped_matmul", [](const std::vector<py::array>& c, const std::vector<py::array>& a, const std::vector<py::array>& b,
                               bool a_transposed, const std::vector<int>& types, bool accumulate) {
        std::vector<Matmul> jobs;
        int64_t work = 0;
        for (size_t i = 0; i < c.size(); ++i) {
            const int64_t M = dim(c[i], 0), N = dim(c[i], 1), K = dim(a[i], a_transposed ? 0 : 1);
            if (M == 0 || N == 0) continue;
            jobs.push_back({f32(c[i]), nullptr, nullptr, f32(a[i]), data<void>(b[i]), nullptr, nullptr, 1, M, N, K, 0, 0,
                            a_transposed, false, Storage(types[i]), accumulate, Activation::none});
            work += M * N * K;
        }
        for (size_t i = 0; i + 1 < jobs.size(); ++i) {
            const Matmul& next = jobs[i + 1];
            if (next.N == jobs[i].N && next.K == jobs[i].K && next.b_type == jobs[i].b_type) jobs[i].b_next = next.b;
        }
        NoGil nogil;
        const int64_t n = int64_t(jobs.size());
        if (n < 2 * num_threads() || work / n >= kWhole) {
            for (const Matmul& job : jobs) multiply(matmul_kernels(), job);
            return;
        }
        deal(n, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) multiply(matmul_kernels(), jobs[size_t(i)]);
        });
    });
}

}  // namespace fastlm
