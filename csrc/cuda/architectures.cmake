# Code for the GPUs that a CUDA compiler knows, and the last one's PTX for those that came after it.
function(lacfast_architectures compiler_version architectures)
  if(compiler_version VERSION_LESS 12.8)
    set(${architectures} 80-real 90 PARENT_SCOPE)
  else()
    set(${architectures} 80-real 90-real 100 PARENT_SCOPE)
  endif()
endfunction()
