// Mixture of experts around its matrix products: the router's softmax and top-k, rows gathered by expert, and their weighted sum.
#pragma once

#include <cstdint>

namespace fastlm {

// probabilities = softmax(logits); experts: the k largest of each row, largest first, equal ones by the lower index; weights: the
// probabilities of these, where `renormalise` is set divided by their sum in the order of k.
struct MoeRoute {
    float* probabilities;  // (R, E)
    int32_t* experts;      // (R, k), each within [0, E) whatever the logits are
    float* weights;        // (R, k)
    const float* logits;   // (R, E)
    int64_t R, E, k;
    bool renormalise;
};

// Places by expert, then in the order of rows. With a capacity, an expert takes that many rows of each group: first choices in the
// order of rows, then second ones.
//
// What follows reads counts, rows and slots that another kernel wrote, when it runs. So each holds every number from there to the
// sizes that the host knows: garbage gives wrong numbers, never a wrong address or a long loop.
struct MoePlaces {
    int32_t* slots;          // (R, k): the place of each choice, -1 where it is dropped
    int32_t* rows;           // (R k,): the row at each place, 0 behind the last place
    int64_t* counts;         // (E,): places of each expert
    const int32_t* experts;  // (R, k)
    int64_t R, E, k;
    int64_t groups, capacity;  // 0: no limit
};

struct MoeGather {
    float* y;             // (P, C): y[p] = x[rows[p]], zeros where there is no such row
    const float* x;       // (R, C)
    const int32_t* rows;  // (P,)
    int64_t P, C, R;
};

// out[r] = residual[r] + sum over j of weights[r, j] * y[slots[r, j]], in the order of j.
struct MoeCombine {
    float* out;             // (R, C)
    const float* y;         // (P, C)
    const int32_t* slots;   // (R, k): rows of y; -1 where there is none
    const float* weights;   // (R, k), or null: ones
    const float* residual;  // (R, C), or null
    int64_t R, C, k, P;
};

struct MoeCombineBackward {
    float* dy;             // (P, C)  =
    float* dweights;       // (R, k)  =, zero where there is no slot
    const float* dout;     // (R, C)
    const float* y;        // (P, C)
    const int32_t* slots;  // (R, k)
    const float* weights;  // (R, k)
    int64_t R, C, k;
};

struct MoeKernels {
    void (*route)(const MoeRoute&);
    void (*places)(const MoePlaces&);
    void (*gather)(const MoeGather&);
    void (*combine)(const MoeCombine&);
    void (*combine_backward)(const MoeCombineBackward&);
};

}  // namespace fastlm
