#include "conv_act_pool.cuh"

template struct lenet_fast::cuda::ConvActPool<double>;
