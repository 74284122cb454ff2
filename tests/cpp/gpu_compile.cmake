# Compiles the functions for GPUs with nvcc, for each architecture that they are for, and fails unless that is without a
# warning and no register is spilled. Prints what each kernel takes.
#     cmake -D NVCC=nvcc -D SOURCE=REPOSITORY -D BUILD=FOLDER -D INCLUDES=FOLDERS -P gpu_compile.cmake
cmake_minimum_required(VERSION 3.24...4.3)

execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE version)
string(REGEX MATCH "release ([0-9]+)" found "${version}")
if(NOT CMAKE_MATCH_1 OR CMAKE_MATCH_1 LESS 12)
  message("SKIPPED: nvcc 12 or later is needed, which knows C++20, got: ${found}")
  return()
endif()

# Without contraction: a fused multiply-add has other bits.
execute_process(COMMAND ${NVCC} -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90
    -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v -I${SOURCE}/cpp/src ${INCLUDES}
    -c ${SOURCE}/cpp/src/cuda/api.cu -o ${BUILD}/api.o
  RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE errors)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "kernels must compile, got ${code}: ${text}${errors}")
endif()
if("${text}${errors}" MATCHES "[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "no register must be spilled, got: ${text}${errors}")
endif()
string(REGEX MATCHALL "entry function '[^']*' for '[^']*'|Used [0-9]+ registers" found "${text}${errors}")
foreach(line IN LISTS found)
  message("${line}")
endforeach()
